"""Writes the weights of a model as files of a bounded size, in pieces of rows.

Nothing but the piece that is being written is in memory, however large a tensor is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fsdpq.checkpoint.bnb_format import MAX_FILE_BYTES
from fsdpq.checkpoint.tensor_stream import TensorSpec, TensorStream
from fsdpq.checkpoint.whole_model import INDEX_NAME, file_names


@dataclass(frozen=True)
class StreamedTensor:
    """One tensor to write.

    Attributes:
        spec: its name, dtype and shape.
        pieces: yields its elements in order, on the host, in its dtype.
    """

    spec: TensorSpec
    pieces: Callable[[], Iterable[Tensor]]


def write_sharded(
    tensors: Sequence[StreamedTensor],
    directory: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[int, int], Any] = lambda _done, _total: None,
) -> int:
    """Writes safetensors files and, for several, their index; returns the bytes of the tensors.

    Ranks: 0 only.
    Memory: one piece, and the small tensors that `TensorStream` keeps.

    Args:
        tensors: all tensors of the model.
        directory: is there.
        max_file_bytes: a file is full at this size; a larger tensor has one of its own.
        report: told ``(done_bytes, total_bytes)`` after each tensor.
    """
    files = list(_split_into_files(tensors, max_file_bytes))
    names = file_names(len(files))
    total = sum(tensor.spec.num_bytes for tensor in tensors)
    done = 0
    for file_name, members in zip(names, files, strict=True):
        with TensorStream(directory / file_name, [t.spec.name for t in members]) as stream:
            for tensor in members:
                done += stream.write_pieces(tensor.spec, tensor.pieces())
                report(done, total)
    if len(files) > 1:
        placed = {t.spec.name: n for n, group in zip(names, files, strict=True) for t in group}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _split_into_files(
    tensors: Sequence[StreamedTensor], max_file_bytes: int
) -> Iterator[list[StreamedTensor]]:
    members: list[StreamedTensor] = []
    size = 0
    for tensor in tensors:
        if members and size + tensor.spec.num_bytes > max_file_bytes:
            yield members
            members, size = [], 0
        members.append(tensor)
        size += tensor.spec.num_bytes
    yield members
