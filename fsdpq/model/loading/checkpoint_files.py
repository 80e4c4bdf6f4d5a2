"""Reads tensors of a safetensors checkpoint by rows; compares names and shapes with the model's.

Rows are read at their place in the file into memory of their own size: a mapping would count what
was touched as resident until the system takes it back, and a file that is cut short under a
mapping ends the process without a message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from fsdpq.dist import rank
from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.directory import (
    PICKLE_HINT,
    check_directory,
    holds_pickles_only,
    pickles_only,
)
from fsdpq.tensor_files.header import join_problems, shorten

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""torch's dtype for those of the format that torch has one element a number for."""


@dataclass(frozen=True)
class ByteRange:
    """A part of a file of the checkpoint.

    Attributes:
        path: the file.
        start: offset of the first byte.
        stop: offset after the last one.
    """

    path: Path
    start: int
    stop: int


class CheckpointFiles:
    """The tensors of a local checkpoint directory.

    What is damaged is not raised here but kept, so that `check_tensors` can say it together with
    what does not fit the model; nothing is read from a damaged checkpoint.

    Args:
        directory: holds ``*.safetensors`` and, for several files, the index.

    Attributes:
        directory: as given.
        damage: all that is wrong with the files; empty where they are whole.
        lost: names of tensors that are damaged.
        num_read_bytes: bytes of tensors that were read so far.

    Raises:
        CheckpointError: there are pickles only.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[Path, FileIO] = {}
        if holds_pickles_only(directory):
            raise CheckpointError(pickles_only(directory), hint=PICKLE_HINT)
        self.directory = directory
        self.num_read_bytes = 0
        found, self.damage = check_directory(directory)
        self.lost: Set[str] = found.lost
        self._entries, self._paths = found.entries, found.files
        self.damage += [
            f"tensor `{shorten(entry.name)}` of `{self._paths[entry.name].name}` is in "
            f"{entry.dtype}, which torch cannot read"
            for entry in self._entries.values()
            if entry.dtype not in DTYPES
        ]

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor in the file."""
        return DTYPES[self._entries[name].dtype]

    def num_rows(self, name: str) -> int:
        """Rows of one tensor as a matrix: all dimensions but the last flattened to one.

        The rows of a vector are its elements; a scalar is one row.
        """
        shape = self._entries[name].shape
        return math.prod(shape[:1]) * math.prod(shape[1:-1])

    def matrix_range(self, name: str, start: int, stop: int) -> ByteRange:
        """Returns where rows ``[start, stop)`` of one tensor as a matrix lie; see `num_rows`."""
        entry = self._entries[name]
        row_bytes = entry.num_bytes // max(1, self.num_rows(name))
        return ByteRange(
            self._paths[name], entry.start + start * row_bytes, entry.start + stop * row_bytes
        )

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns ``tensor[start:stop]`` of one tensor, in the file's dtype, on the host.

        A scalar is returned whole.

        Memory: those rows.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was; names rank, file,
                tensor and offset.
        """
        shape = self._entries[name].shape
        if not shape:
            return self.read_matrix_rows(name, 0, 1).reshape(())
        each = math.prod(shape[1:-1])
        rows = self.read_matrix_rows(name, start * each, stop * each)
        return rows.reshape(stop - start, *shape[1:])

    def read_matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` of one tensor as a matrix, as `read_rows` does."""
        if self.damage:
            raise RuntimeError(f"{self.directory} is damaged, see `check_tensors`")
        entry = self._entries[name]
        width = entry.shape[-1:] if len(entry.shape) > 1 else ()
        rows = torch.empty((stop - start, *width), dtype=DTYPES[entry.dtype])
        place = self.matrix_range(name, start, stop)
        self._read(name, place, rows.reshape(-1).view(torch.uint8).numpy().data)
        return rows

    def _read(self, name: str, place: ByteRange, target: memoryview) -> None:
        done, what = 0, ""
        try:
            file = self._open(place.path)
            file.seek(place.start)
            while done < len(target):
                got = file.readinto(target[done:])
                if not got:
                    what = f"ends at byte {file.seek(0, 2)}"
                    break
                done += got
        except OSError as error:
            what = f"cannot be read at byte {place.start + done}: {error.strerror or error}"
        self.num_read_bytes += done
        if what:
            raise CheckpointError(
                f"rank {rank()}: `{place.path}` {what}, while bytes {place.start} to {place.stop} "
                f"of tensor `{name}` were read",
                hint="the file changed or its disk failed after it was opened: check the disk, "
                "download the model again",
            )

    def _open(self, path: Path) -> FileIO:
        if path not in self._files:
            self._files[path] = FileIO(path)
        return self._files[path]


def check_tensors(
    files: CheckpointFiles,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored: set[str],
    lost: Set[str] = frozenset(),
) -> None:
    """Compares the names and shapes of a checkpoint with what the model needs.

    Args:
        files: the checkpoint; whatever is damaged in it is said too.
        found: shape of every tensor in it, by the model's names.
        expected: shape of every tensor that the model needs.
        ignored: names that may be there and are not needed (tied copies).
        lost: names that are there but damaged: they are not missing.

    Raises:
        CheckpointError: all damaged, missing, unexpected and mis-shaped tensors at once.
    """
    wrong = list(files.damage)
    wrong += [f"missing `{name}`" for name in sorted(expected.keys() - found.keys() - lost)]
    wrong += [
        f"unexpected `{shorten(name)}`"
        for name in sorted(found.keys() - expected.keys() - ignored)
        if not name.endswith(".rotary_emb.inv_freq")
    ]
    wrong += [
        f"`{name}` has shape {list(found[name])}, the model needs {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if wrong:
        what = "is not whole" if files.damage else "does not fit its config.json"
        raise CheckpointError(
            join_problems(f"the checkpoint `{files.directory}` {what}", wrong),
            hint="the download is incomplete, or weights and config.json are of two models: "
            "download the model again",
        )


def to_device(rows: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns ``rows`` on ``device``; floating-point values are cast to ``dtype``."""
    return rows.to(device=device, dtype=dtype if rows.is_floating_point() else rows.dtype)
