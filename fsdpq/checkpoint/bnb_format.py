"""Writes a model with 4-bit weights as transformers writes and reads one.

https://huggingface.co/docs/transformers/quantization/bitsandbytes. The tensors come one target at a
time: whoever gathers them keeps no more than one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PretrainedConfig

from fsdpq.checkpoint.directory import whole_directory
from fsdpq.checkpoint.tensor_stream import TensorStream
from fsdpq.checkpoint.whole_model import COPIED, INDEX_NAME, file_names
from fsdpq.dist import rank

MAX_FILE_BYTES = 5_000_000_000
"""A file is full at this size, as in transformers; one target is never split."""


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of one target.

    Attributes:
        names: of all its tensors, in the checkpoint.
        num_bytes: about how many they have.
        gather: returns them on the host, by name; on ranks other than 0 it may return nothing.
            Ranks: all (collective).
    """

    names: Sequence[str]
    num_bytes: int
    gather: Callable[[], Mapping[str, Tensor]]


def quantization_config(
    *, quant_type: str, double_quant: bool, dtype: torch.dtype, unquantized: Sequence[str]
) -> dict[str, Any]:
    """Returns what transformers needs in ``config.json`` to read the weights.

    Args:
        quant_type: ``nf4`` or ``fp4``.
        double_quant: whether the scales are quantized too.
        dtype: in which products are computed.
        unquantized: names of all linears that are plain, the head among them.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(unquantized),
    ).to_dict()


def write_bnb_directory(
    groups: Sequence[TensorGroup],
    directory: Path,
    *,
    config: PretrainedConfig,
    original: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[int, int], Any] = lambda _done, _total: None,
) -> None:
    """Writes ``config.json``, the weights and the tokenizer's files.

    Ranks: all (collective); rank 0 writes.
    Memory: the tensors of one target, and the small ones that `TensorStream` keeps.

    Args:
        groups: the tensors of every target, in the same order on all ranks.
        directory: where to; replaced if it is there.
        config: of the model, with its ``quantization_config``.
        original: the checkpoint that the tokenizer's files are copied from.
        max_file_bytes: a file is full at this size.
        report: told ``(done_bytes, total_bytes)`` after each group.

    Raises:
        ExportError: the directory cannot be written.
    """
    progress = _Progress(groups, report)
    if rank() != 0:
        for group in groups:
            group.gather()
            progress.add(group)
        return
    with whole_directory(directory, what="the model") as partial:
        files = list(_split_into_files(groups, max_file_bytes))
        names = file_names(len(files))
        total = sum(
            _write_file(partial / name, members, progress)
            for name, members in zip(names, files, strict=True)
        )
        if len(files) > 1:
            placed = {
                tensor: name
                for name, members in zip(names, files, strict=True)
                for group in members
                for tensor in group.names
            }
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        config.save_pretrained(partial)
        for path in sorted({path for pattern in COPIED for path in original.glob(pattern)}):
            shutil.copyfile(path, partial / path.name)


class _Progress:
    """Counts the bytes of groups that are done."""

    def __init__(self, groups: Sequence[TensorGroup], report: Callable[[int, int], Any]) -> None:
        self._total = sum(group.num_bytes for group in groups)
        self._done = 0
        self._report = report

    def add(self, group: TensorGroup) -> None:
        self._done += group.num_bytes
        self._report(self._done, self._total)


def _write_file(path: Path, members: Sequence[TensorGroup], progress: _Progress) -> int:
    """Writes the tensors of some groups; returns their bytes."""
    num_bytes = 0
    with TensorStream(path, [name for group in members for name in group.names]) as stream:
        for group in members:
            for name, tensor in group.gather().items():
                num_bytes += stream.write(name, tensor)
            progress.add(group)
    return num_bytes


def _split_into_files(
    groups: Sequence[TensorGroup], max_file_bytes: int
) -> Iterator[list[TensorGroup]]:
    members: list[TensorGroup] = []
    size = 0
    for group in groups:
        if members and size + group.num_bytes > max_file_bytes:
            yield members
            members, size = [], 0
        members.append(group)
        size += group.num_bytes
    yield members
