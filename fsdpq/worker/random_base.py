"""A model without its files: weights made on the device, or zeros, for shapes nobody downloads.

All that is read is a ``config.json``. Memory and speed of a run are right; its losses mean nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from fsdpq.dist import own_shard
from fsdpq.model.loading.source import BaseSource
from fsdpq.model.loading.stream import load_base
from fsdpq.model.loading.targets import LoadingTarget, full_shape, packed_shards
from fsdpq.model.meta import count_parameters
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.protocols import Adapter
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.worker.assemble import (
    Assembled,
    apply_adapter,
    build_model,
    cast_buffers,
    resolve_dtype,
    shard_model,
)

STD = 0.02
"""Of the weights, as transformers initialises Llama."""


def random_weight(
    name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns the weight ``name``, drawn from a generator seeded by it; norms and biases are ones.

    Whoever asks for the same name and shape gets the same weight.
    """
    if len(shape) <= 1:
        return torch.ones(shape, dtype=dtype, device=device)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=STD, generator=generator)


class RandomSource:
    """Fills a base with random weights, quantized on the device; see `BaseSource`.

    Args:
        dtype: of the weights before they are quantized.
        device: where they are made.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target. Memory: the whole tensor."""
        if isinstance(target, PackedMatrix):
            shape = (target.out_features, target.in_features)
            weight = random_weight(name, shape, dtype=self._dtype, device=self._device)
            target.quantizer.quantize_shards(
                lambda start, stop: weight[start:stop], shape, packed_shards(target)
            )
            return
        weight = random_weight(name, full_shape(target), dtype=self._dtype, device=self._device)
        shard = own_shard(target)
        shard.rows.copy_(weight[shard.start : shard.stop] if weight.dim() else weight)


class EmptySource:
    """Fills a base with zeros, without quantizing any; see `BaseSource`."""

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target."""
        del name
        if isinstance(target, PackedMatrix):
            for shard in packed_shards(target).values():
                shard.rows.zero_()
        else:
            own_shard(target).rows.zero_()


def assemble_random(
    recipe: Recipe,
    config_dir: Path,
    *,
    device: torch.device,
    source: BaseSource | None = None,
    trust_remote_code: bool = False,
) -> Assembled:
    """Returns what ``assemble_model`` does, with a base of random weights.

    Ranks: all (collective).

    Args:
        recipe: resolved.
        config_dir: holds the model's ``config.json``.
        device: this rank's.
        source: of the base instead of random weights.
        trust_remote_code: run Python code that the model brings.
    """
    dtype, precision = resolve_dtype(recipe, device), precision_of(recipe)
    adapter: Adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    model = build_model(
        recipe, config_dir, adapter, dtype=dtype, trust_remote_code=trust_remote_code
    )
    num_parameters, num_quantized = count_parameters(model)
    apply_adapter(model, adapter)
    num_groups, notice = shard_model(model, recipe, device, precision=precision)
    load_base(
        model, source or RandomSource(dtype=dtype, device=device), dtype=dtype, device=device,
        offload=recipe.fsdp.offload, offload_trained=recipe.fsdp.offload_trained,
        report=lambda _done, _total: None,
    )  # fmt: skip
    cast_buffers(model, precision, persistent=True)
    adapter.init_adapter(model, seed=recipe.training.seed, dtype=dtype, device=device)
    notices = (notice,) if notice else ()
    return Assembled(model, num_parameters, num_quantized, num_groups, notices)
