"""Where every tensor of a quantized base lies in its file, known before a weight is read. No torch.

The file is a stock safetensors file. The rows of a tensor follow each other, so the rows of one
rank are one range of bytes, for any number of ranks. A rank with fewer rows than others maps what
follows them as well, to have as many: behind the last tensor there is room for that.

Every tensor begins at a multiple of `ALIGNMENT` bytes, for memory mapping: the header is filled up
with spaces to `HEADER_ALIGNMENT`, and since safetensors allows no holes, gaps are tensors of their
own, named ``__pad__.0`` and so on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fsdpq.tensor_files.header import DTYPE_BITS, Entry

ALIGNMENT = 64
HEADER_ALIGNMENT = 4096
PAD_NAME = "__pad__"

MOST_RANKS = 64
"""Up to so many ranks find the rows that they lack inside the file: one rank less is the most that
the ranks of an uneven tensor lack together."""


class StoredTensor(NamedTuple):
    """One tensor of a base.

    Attributes:
        dtype: as safetensors calls it, a key of `fsdpq.tensor_files.header.DTYPE_BITS`.
        shape: in elements.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of all for a tensor without dimensions."""
        return math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class BaseLayout:
    """The plan of a base's file.

    Attributes:
        header: the first bytes of the file, up to the first tensor.
        entries: every tensor by name, pads left out; offsets count from the file's beginning.
        num_bytes: size of the file.
    """

    header: bytes
    entries: dict[str, Entry]
    num_bytes: int


def lay_out(tensors: Mapping[str, StoredTensor]) -> BaseLayout:
    """Returns the layout of tensors that follow each other in the order of ``tensors``."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, num_pads, end = 0, 0, 0
    for index, (name, tensor) in enumerate(tensors.items(), 1):
        num_bytes = tensor.num_bytes
        described[name] = _describe(tensor.dtype, tensor.shape, position, num_bytes)
        position += num_bytes
        end = max(end, position + (MOST_RANKS - 1) * tensor.row_bytes)
        gap = -position % ALIGNMENT
        if index == len(tensors):
            gap = end + -end % ALIGNMENT - position
        if gap:
            described[f"{PAD_NAME}.{num_pads}"] = _describe("U8", (gap,), position, gap)
            position, num_pads = position + gap, num_pads + 1
    text = json.dumps(described, separators=(",", ":")).encode()
    length = -(-(len(text) + 8) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    entries = {
        name: Entry(
            name,
            tensor.dtype,
            tensor.shape,
            *(len(header) + offset for offset in described[name]["data_offsets"]),
        )
        for name, tensor in tensors.items()
    }
    return BaseLayout(header, entries, len(header) + position)


def _describe(dtype: str, shape: tuple[int, ...], position: int, num_bytes: int) -> dict[str, Any]:
    offsets = [position, position + num_bytes]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
