"""Writes a safetensors file tensor by tensor, holding one of them at a time.

The header comes first in the file and is known last: room for it is kept, and what is left over is
spaces, which the format allows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
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

    def _append(self, name: str, tensor: Tensor) -> None:
        stop = self._offset + tensor.nbytes
        self._entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, stop],
        }
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        self._offset = stop

    def _finish(self) -> None:
        for name, tensor in sorted(self._late.items(), key=lambda item: -item[1].itemsize):
            self._append(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"a header of {len(header)} bytes, room for {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
