"""Writes a safetensors file tensor by tensor, holding one of them at a time.

The header comes first in the file and is known last: room for it is kept, and what is left over is
spaces, which the format allows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8
"""Every tensor starts at a multiple of its item's size: readers view the bytes in place."""

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}

_ENTRY_BYTES = 160
"""The longest header entry of a tensor of few dimensions, without its name."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file, before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorStream:
    """A safetensors file that is being written.

    Memory: tensors whose size is no multiple of `ALIGNMENT` are kept until the end, since holes are
    not allowed: those of a model are its smallest.

    Args:
        path: of the new file.
        names: of all tensors that it will hold.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + _ENTRY_BYTES
        self._room += -self._room % ALIGNMENT
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._late: dict[str, Tensor] = {}
        self._offset = 0
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))

    def __enter__(self) -> TensorStream:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Completes the file, unless there was an error."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> int:
        """Adds one tensor, on the host; returns its bytes."""
        if tensor.nbytes % ALIGNMENT:
            self._late[name] = tensor.clone()
        else:
            self._append(name, tensor)
        return tensor.nbytes

    def write_pieces(self, spec: TensorSpec, pieces: Iterable[Tensor]) -> int:
        """Adds one tensor that comes in pieces; returns its bytes.

        Memory: one piece.

        Args:
            spec: of the whole tensor.
            pieces: its elements in order, of any shapes, on the host, in the tensor's dtype.
        """
        if spec.num_bytes % ALIGNMENT:
            whole = torch.cat([piece.reshape(-1) for piece in pieces]).view(spec.shape)
            return self.write(spec.name, whole)
        self._enter(spec.name, spec.dtype, spec.shape, spec.num_bytes)
        written = 0
        for piece in pieces:
            self._write_bytes(piece)
            written += piece.nbytes
        if written != spec.num_bytes:
            raise ValueError(f"`{spec.name}` has {spec.num_bytes} bytes, its pieces {written}")
        return written

    def _append(self, name: str, tensor: Tensor) -> None:
        self._enter(name, tensor.dtype, tensor.shape, tensor.nbytes)
        self._write_bytes(tensor)

    def _enter(self, name: str, dtype: torch.dtype, shape: Iterable[int], num_bytes: int) -> None:
        """Gives the next ``num_bytes`` of the file to a tensor."""
        stop = self._offset + num_bytes
        self._entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [self._offset, stop],
        }
        self._offset = stop

    def _write_bytes(self, tensor: Tensor) -> None:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)

    def _finish(self) -> None:
        for name, tensor in sorted(self._late.items(), key=lambda item: -item[1].itemsize):
            self._append(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"a header of {len(header)} bytes, room for {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
