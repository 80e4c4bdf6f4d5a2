"""Writes a whole model as transformers reads it, or only what of it was trained, by tensors.

Trained tensors are gathered on all ranks, the others are read again from the original checkpoint,
and rank 0 writes a file as soon as it is full. No rank ever holds the model, only one file's worth
of tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fsdpq.checkpoint.directory import save_tensors, whole_directory
from fsdpq.dist import gather_whole, rank

FILE_BYTES = 1 << 30
"""A file is full at this size; a larger tensor has one of its own."""

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DELTA_NAME = "delta.json"
"""What a delta belongs to; it has no ``config.json``, so that nobody takes it for a model."""

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
        content: the sharded Parameter where it was trained, else what reads the original tensor.
    """

    name: str
    shape: tuple[int, ...]
    content: Tensor | Callable[[], Tensor]


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
        _take_part(tensors)
        return
    with whole_directory(directory, what="the model") as partial:
        _write_tensors(tensors, partial, dtype)
        config.dtype = dtype
        config.save_pretrained(partial)
        for path in sorted({path for pattern in COPIED for path in original.glob(pattern)}):
            shutil.copyfile(path, partial / path.name)


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta belongs to.

    Attributes:
        base_model: name or path of the checkpoint that all other tensors come from.
        revision: its commit, None where it is no repository of a hub.
        layers_prefix: what stands before a decoder layer's number in names of tensors.
        layer_sources: the checkpoint's layer that each layer of the model is read from.
        config: of the model, as its ``config.json`` would be.
    """

    base_model: str
    revision: str | None
    layers_prefix: str
    layer_sources: tuple[int, ...]
    config: dict[str, Any]


def export_delta(
    tensors: Sequence[ModelTensor], directory: Path, *, info: DeltaInfo, dtype: torch.dtype
) -> None:
    """Writes the trained tensors, and what they belong to into ``delta.json``.

    Ranks: all (collective); rank 0 writes.
    Memory: rank 0 holds one file's tensors, `FILE_BYTES`, or the largest tensor.

    Args:
        tensors: the trained ones, in the same order on all ranks.
        directory: where to; replaced if it is there.
        info: what they belong to.
        dtype: of the weights in the files.

    Raises:
        ExportError: the directory cannot be written.
    """
    if rank() != 0:
        _take_part(tensors)
        return
    with whole_directory(directory, what="the delta") as partial:
        _write_tensors(tensors, partial, dtype)
        (partial / DELTA_NAME).write_text(json.dumps(asdict(info), indent=2) + "\n")


def _take_part(tensors: Sequence[ModelTensor]) -> None:
    """Gathers with rank 0, which writes."""
    for tensor in tensors:
        if isinstance(tensor.content, Tensor):
            gather_whole(tensor.content)


def _write_tensors(tensors: Sequence[ModelTensor], directory: Path, dtype: torch.dtype) -> None:
    """Writes files of at most `FILE_BYTES`, and an index where there are several."""
    files = list(_split_into_files(tensors, dtype.itemsize))
    names = file_names(len(files))
    for name, group in zip(names, files, strict=True):
        save_tensors({t.name: _whole(t, dtype) for t in group}, directory / name)
    if len(files) > 1:
        placed = {t.name: n for n, group in zip(names, files, strict=True) for t in group}
        total = sum(_num_bytes(tensor, dtype.itemsize) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _whole(tensor: ModelTensor, dtype: torch.dtype) -> Tensor:
    content = tensor.content
    found = gather_whole(content) if isinstance(content, Tensor) else content()
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
