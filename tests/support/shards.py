"""What the ranks of a sharded model really store, and what a plan says they do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdpq.dist import own_shard
from fsdpq.model.causal_lm import CausalLM
from fsdpq.plan.weights import Weights
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.worker.assemble import apply_adapter, build_model, resolve_dtype, shard_model


@dataclass(frozen=True)
class GroupBytes:
    """One FSDP group on rank 0.

    Attributes:
        frozen: stored, not trained.
        trained: stored and trained.
        gathered: of the unsharded group, as FSDP allocates it.
    """

    frozen: int
    trained: int
    gathered: int


@dataclass(frozen=True)
class ShardBytes:
    """All of a model on rank 0.

    Attributes:
        layers: of the decoder layers, in order of size.
        others: embedding, head where it has a group of its own, and the rest.
        num_groups: FSDP groups.
    """

    layers: tuple[GroupBytes, ...]
    others: tuple[GroupBytes, ...]
    num_groups: int


def planned_bytes(weights: Weights) -> ShardBytes:
    """Returns what a plan says."""
    found = [
        (group, GroupBytes(group.shard.frozen, group.shard.trained, group.gathered_bytes))
        for group in weights.groups
    ]
    layers = [each for group, each in found if group.name == "layer" for _ in range(group.count)]
    others = [each for group, each in found if group.name != "layer"]
    return ShardBytes(_by_size(layers), tuple(others), weights.num_groups)


def real_bytes(model: CausalLM, num_groups: int) -> ShardBytes:
    """Returns what this rank stores of a sharded model; on meta is enough."""
    seen: set[nn.Parameter] = set()
    layers = [_group_bytes([layer], seen) for layer in model.decoder_layers]
    others = [_group_bytes(group, seen) for group in model.embedding_groups]
    return ShardBytes(_by_size(layers), (*others, _group_bytes([model], seen)), num_groups)


def _by_size(groups: list[GroupBytes]) -> tuple[GroupBytes, ...]:
    return tuple(sorted(groups, key=lambda group: (group.frozen, group.trained)))


def _group_bytes(modules: list[nn.Module], seen: set[nn.Parameter]) -> GroupBytes:
    totals = {False: 0, True: 0}
    for parameter in (p for module in modules for p in module.parameters()):
        if parameter not in seen:
            seen.add(parameter)
            totals[parameter.requires_grad] += own_shard(parameter).rows.nbytes
    first = modules[0]
    gathered = _gathered_bytes(first) if isinstance(first, FSDPModule) else 0
    return GroupBytes(totals[False], totals[True], gathered)


def _gathered_bytes(module: FSDPModule) -> int:
    state: Any = module._get_fsdp_state()
    total = 0
    for group in state._fsdp_param_groups:
        for each in group.fsdp_params:
            each.init_dtype_attrs(group.mp_policy)  # FSDP itself does so at the first forward
            weights = math.prod(each.padded_sharded_param_size) * each.mesh_info.shard_mesh_size
            total += weights * (each.param_dtype or each.orig_dtype).itemsize
    return total


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """Makes this process rank 0 of ``num_ranks`` whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def shard_on_meta(recipe: Recipe, directory: Path) -> ShardBytes:
    """Returns what rank 0 of a recipe stores, from a ``config.json`` alone."""
    device = torch.device("cpu")
    with fake_ranks(int(recipe.launch.nproc_per_node) * recipe.launch.max_nodes):
        adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
        dtype = resolve_dtype(recipe, device)
        model = build_model(recipe, directory, adapter, dtype=dtype, trust_remote_code=False)
        apply_adapter(model, adapter)
        num_groups, _ = shard_model(model, recipe, device, precision=precision_of(recipe))
        return real_bytes(model, num_groups)
