"""Where every tensor of a quantized base lies in its file, known before any weight is read.

The file is a stock safetensors file. The rows of a tensor follow each other, so the rows of one
rank are one range of bytes, for any number of ranks. A rank with fewer rows than others maps what
follows them as well, to have as many: behind the last tensor there is room for that.

Every tensor begins at a multiple of `ALIGNMENT` bytes, for memory mapping: the header is filled up
with spaces to `HEADER_ALIGNMENT`, and since safetensors allows no holes, gaps are tensors of their
own, named ``__pad__.0`` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.checkpoint_files import DTYPES
from fsdpq.model.loading.targets import LoadingTarget, full_shape, loading_targets
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.tensor_files.header import Entry

ALIGNMENT = 64
HEADER_ALIGNMENT = 4096
PAD_NAME = "__pad__"

MOST_RANKS = 64
"""Up to so many ranks find the rows that they lack inside the file: one rank less is the most that
the ranks of an uneven tensor lack together."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What safetensors calls the dtypes that a model's tensors have."""


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one tensor of a base."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of all for a tensor without dimensions."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


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


def packed_name(name: str, packed: str) -> str:
    """Returns the name in the file of one byte tensor of the target ``name``."""
    return f"{name}.{packed}"


def target_tensors(name: str, target: LoadingTarget) -> dict[str, TensorSpec]:
    """Returns what one target of a model is in the file: byte tensors, or a plain tensor."""
    if not isinstance(target, PackedMatrix):
        return {name: TensorSpec(target.dtype, full_shape(target))}
    shapes = target.quantizer.packed_shapes(target.out_features, target.in_features)
    return {
        packed_name(name, packed): TensorSpec(torch.uint8, shape)
        for packed, shape in shapes.items()
    }


def plan_layout(model: CausalLM) -> BaseLayout:
    """Returns where the tensors of ``model`` go, the same for any number of ranks.

    Args:
        model: with the layers of its checkpoint; on meta is enough.
    """
    specs: dict[str, TensorSpec] = {}
    for name, target in loading_targets(model).items():
        specs |= target_tensors(name, target)
    return layout_of(specs)


def layout_of(specs: Mapping[str, TensorSpec]) -> BaseLayout:
    """Returns the layout of tensors that follow each other in the order of ``specs``."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, num_pads, end = 0, 0, 0
    for index, (name, spec) in enumerate(specs.items(), 1):
        described[name] = _describe(DTYPE_NAMES[spec.dtype], spec.shape, position, spec.num_bytes)
        position += spec.num_bytes
        end = max(end, position + (MOST_RANKS - 1) * spec.row_bytes)
        gap = -position % ALIGNMENT
        if index == len(specs):
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
            described[name]["dtype"],
            spec.shape,
            *(len(header) + offset for offset in described[name]["data_offsets"]),
        )
        for name, spec in specs.items()
    }
    return BaseLayout(header, entries, len(header) + position)


def _describe(dtype: str, shape: tuple[int, ...], position: int, num_bytes: int) -> dict[str, Any]:
    offsets = [position, position + num_bytes]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
