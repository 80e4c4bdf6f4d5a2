"""Writes bfloat16 safetensors files tensor by tensor, from float32 numpy rows.

numpy has no bfloat16, and the numpy face of the safetensors package therefore cannot write it; the
format is a length, a JSON header and raw bytes, so this module writes those itself and never holds
more than the rows it is given. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BF16_BYTES = 2


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write.

    Attributes:
        name: its name in the file.
        shape: its shape, in elements.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in bfloat16."""
        return math.prod(self.shape) * BF16_BYTES


def round_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Returns the bfloat16 bits of ``values``, rounded to nearest, ties to even.

    Args:
        values: float32, any shape.

    Returns:
        uint16 of the same shape; NaN stays a (quiet) NaN, overflow becomes infinity, as in torch.
    """
    import numpy as np

    # `Any`: numpy 2.4 types `view` with an unknown overload
    flat: Any = np.ascontiguousarray(values, dtype=np.float32)
    bits: Any = flat.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + odd) >> 16
    nan = np.isnan(flat)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")


def write_bf16(
    path: Path, plans: Sequence[TensorPlan], rows: Iterable[npt.NDArray[np.float32]]
) -> None:
    """Writes ``plans`` to ``path``, reading their values from ``rows`` in that order.

    Memory: peak is three times the largest array that ``rows`` yields.

    Args:
        path: the file to write.
        plans: names and shapes; they fix the order of the bytes.
        rows: float32 arrays that, one after the other, fill the tensors in the order of ``plans``;
            an array never crosses from one tensor to the next.

    Raises:
        ValueError: ``rows`` do not fill the tensors exactly.
    """
    source = iter(rows)
    with path.open("wb") as file:
        file.write(_header(plans))
        for plan in plans:
            _write_tensor(file, plan, source)
    if next(source, None) is not None:
        raise ValueError("more rows than tensors")


def _write_tensor(file: Any, plan: TensorPlan, source: Iterator[npt.NDArray[np.float32]]) -> None:
    left = plan.num_bytes
    while left > 0:
        values = next(source, None)
        if values is None:
            raise ValueError(f"`{plan.name}` misses {left} bytes")
        data = round_to_bf16(values).tobytes()
        left -= len(data)
        file.write(data)
    if left < 0:
        raise ValueError(f"`{plan.name}` is {-left} bytes too long")


def _header(plans: Sequence[TensorPlan]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.num_bytes
        entries[plan.name] = {
            "dtype": "BF16",
            "shape": list(plan.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
