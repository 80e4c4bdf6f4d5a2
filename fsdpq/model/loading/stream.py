"""Fills a sharded model from a source, target by target.

Every rank fills only the rows it owns: no rank, on GPU or host, ever holds the model. All ranks
walk the targets in the same order, because double quantization gathers the scales of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdpq.dist import own_shard
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.buffers import allocate, recompute_buffers
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.model.loading.source import BaseSource, copy_rows, row_reader
from fsdpq.model.loading.targets import full_shape, loading_targets, own_weights, tied_names


def load_base(
    model: CausalLM,
    source: BaseSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str = "none",
    offload_trained: bool = True,
    report: Callable[[int, int], Any],
) -> None:
    """Fills every parameter of the base and buffer of a sharded meta model, in place.

    Ranks: all (collective).
    Memory: the rank's shards plus about the rank's rows of the largest tensor.

    Args:
        model: after ``fully_shard``, on meta; an adapter's parameters are allocated, not filled.
        source: where the base comes from.
        dtype: of the model; bytes are counted in it.
        device: this rank's device; buffers live there.
        offload: ``fsdp.offload``: with ``cpu`` shards lie in host memory, with ``disk`` those of
            frozen parameters in a file that ``source`` maps, and get no memory here.
        offload_trained: False gives trained parameters memory on ``device`` all the same.
        report: told ``(done_bytes, total_bytes)`` of this rank, first and after each
            tensor.

    Raises:
        CheckpointError: a file is damaged.
    """
    shards = device if offload == "none" else torch.device("cpu")
    allocate(
        model,
        shards,
        buffers=device,
        frozen=offload != "disk",
        trained=None if offload_trained else device,
    )
    recompute_buffers(model.hf)
    targets = loading_targets(model)  # only now: `to_empty` made new buffers
    total = sum(own_weights(target) for target in targets.values()) * dtype.itemsize
    done = 0
    report(done, total)
    for name, target in targets.items():
        source.fill(name, target)
        done += own_weights(target) * dtype.itemsize
        report(done, total)


def load_trained_base(model: CausalLM, directory: Path) -> None:
    """Fills the trained parameters of the base from a checkpoint, in place.

    Args:
        model: sharded and loaded.
        directory: a checkpoint with as many layers as the model has; tensors that are not trained
            may be missing.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file is damaged.
    """
    targets = loading_targets(model)
    trained = {
        name: target
        for name, target in targets.items()
        if isinstance(target, nn.Parameter) and target.requires_grad
    }
    shapes = {name: full_shape(target) for name, target in trained.items()}
    ignored = tied_names(model, targets) | (targets.keys() - trained.keys())
    tensors = ModelTensors(CheckpointFiles(directory), model.hf, shapes, ignored=ignored)
    for name, target in trained.items():
        device = own_shard(target).rows.device
        read = row_reader(tensors, name, target, dtype=target.dtype, device=device)
        copy_rows(read, own_shard(target))
