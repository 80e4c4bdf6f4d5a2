"""Writes a whole model as transformers reads it, tensor by tensor.

Trained tensors are gathered on all ranks, the others are read again from the original checkpoint,
and rank 0 writes a file as soon as it is full. No rank ever holds the model, only one file's worth
of tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fsdpq.checkpoint.directory import save_tensors, whole_directory
from fsdpq.dist import gather_whole, rank

FILE_BYTES = 1 << 30
"""A file is full at this size; a larger tensor has one of its own."""

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "generation_config.json",
)  # fmt: skip
"""Files of the original checkpoint that belong to the trained model as they are."""


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the model to write.

    Attributes:
        name: as transformers calls it.
        shape: of the whole tensor.
        trained: the sharded Parameter, None where the original is kept.
        read_original: returns the original tensor on the host.
    """

    name: str
    shape: tuple[int, ...]
    trained: Tensor | None
    read_original: Callable[[], Tensor]


def export_model(
    tensors: Sequence[ModelTensor],
    directory: Path,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype,
    original: Path,
) -> None:
    """Writes ``config.json``, the weights and the tokenizer's files.

    Ranks: all (collective); rank 0 writes.
    Memory: rank 0 holds one file's tensors, `FILE_BYTES`, or the largest tensor.

    Args:
        tensors: all tensors of the model, in the same order on all ranks.
        directory: where to; replaced if it is there.
        config: of the model as it is now.
        dtype: of the floating-point weights in the files.
        original: the checkpoint that the tokenizer's files are copied from.

    Raises:
        ExportError: the directory cannot be written.
    """
    if rank() != 0:
        for tensor in tensors:
            if tensor.trained is not None:
                gather_whole(tensor.trained)
        return
    with whole_directory(directory, what="the model") as partial:
        files = list(_split_into_files(tensors, dtype.itemsize))
        names = file_names(len(files))
        for name, group in zip(names, files, strict=True):
            save_tensors({t.name: _whole(t, dtype) for t in group}, partial / name)
        if len(files) > 1:
            placed = {t.name: n for n, group in zip(names, files, strict=True) for t in group}
            total = sum(_num_bytes(tensor, dtype.itemsize) for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        config.dtype = dtype
        config.save_pretrained(partial)
        for path in sorted({path for pattern in COPIED for path in original.glob(pattern)}):
            shutil.copyfile(path, partial / path.name)


def _whole(tensor: ModelTensor, dtype: torch.dtype) -> Tensor:
    found = tensor.read_original() if tensor.trained is None else gather_whole(tensor.trained)
    # A copy, since safetensors refuses tensors that share memory.
    return found.to(device="cpu", dtype=dtype if found.is_floating_point() else None, copy=True)


def _num_bytes(tensor: ModelTensor, itemsize: int) -> int:
    return torch.Size(tensor.shape).numel() * itemsize


def _split_into_files(tensors: Sequence[ModelTensor], itemsize: int) -> Iterator[list[ModelTensor]]:
    group: list[ModelTensor] = []
    size = 0
    for tensor in tensors:
        num_bytes = _num_bytes(tensor, itemsize)
        if group and size + num_bytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += num_bytes
    yield group


def file_names(num_files: int) -> list[str]:
    """Returns what transformers calls the weight files of a model."""
    if num_files == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
