"""Rules about ``fsdp``: strategies, groups of ranks, offload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect, model_directory, num_ranks
from fsdpq.recipe.root import Recipe
from fsdpq.tensor_files.base_manifest import is_base


def check_strategy_has_ranks(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A sharding strategy other than the default for a single rank."""
    if num_ranks(recipe) == 1:
        hint = "delete it, or raise `launch.nproc_per_node`"
        yield from has_no_effect(recipe, "fsdp", "strategy", "with one rank", hint)


def check_shard_size_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``shard_size`` without a hybrid strategy."""
    strategy = recipe.fsdp.strategy
    if not strategy.startswith("hybrid"):
        hint = "delete it, or use `strategy: hybrid_full_shard`"
        reason = f"with `fsdp.strategy: {strategy}`"
        yield from has_no_effect(recipe, "fsdp", "shard_size", reason, hint)


def check_shard_size_divides(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Groups of ``shard_size`` ranks that do not fill the ranks of the run."""
    most, size = num_ranks(recipe), recipe.fsdp.shard_size
    if most is None or size is None:
        return
    nodes = recipe.launch.max_nodes
    counts = [most // nodes * number for number in range(nodes, recipe.launch.min_nodes - 1, -1)]
    ranks = next((count for count in counts if count % size), None)
    if ranks is not None:
        sizes = [n for n in range(2, ranks) if ranks % n == 0]
        message = f"`fsdp.shard_size` is {size}, which does not divide {ranks} ranks"
        hint = f"use one of {', '.join(map(str, sizes))}" if sizes else "use another strategy"
        yield Problem(message, "fsdp.shard_size", hint=hint)


def check_hybrid_has_groups(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A hybrid strategy with one group, which is the plain one, or with groups of one rank."""
    strategy, ranks = recipe.fsdp.strategy, num_ranks(recipe)
    if not strategy.startswith("hybrid") or ranks is None or ranks == 1:
        return
    plain = strategy.removeprefix("hybrid_")
    if recipe.fsdp.shard_size == ranks:
        message = f"`fsdp.strategy: {strategy}` has one group of {ranks} ranks, which is"
        yield Problem(f"{message} `{plain}`", "fsdp.strategy", hint=f"use `strategy: {plain}`")
    elif recipe.fsdp.shard_size is None and recipe.launch.max_nodes == 1 and ranks < 4:
        message = f"`fsdp.strategy: {strategy}` needs two groups of two ranks, and there are"
        hint = f"use `strategy: {plain}`, or four ranks"
        yield Problem(f"{message} {ranks}", "fsdp.strategy", hint=hint)


def check_offloaded_activations_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``activation_offload`` without activation checkpointing: there is nothing to move."""
    if recipe.fsdp.activation_checkpointing == "none":
        reason = "with `activation_checkpointing: none`"
        hint = "use `activation_checkpointing: full`, or delete `activation_offload`"
        yield from has_no_effect(recipe, "fsdp", "activation_offload", reason, hint)


def check_kept_weights_are_few(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``offload_trained: false`` without ``offload``, or where all weights are trained."""
    fsdp = recipe.fsdp
    if fsdp.offload == "none":
        hint = "use `offload: cpu`, or delete `offload_trained`"
        reason = "with `fsdp.offload: none`"
        yield from has_no_effect(recipe, "fsdp", "offload_trained", reason, hint)
    elif not fsdp.offload_trained and recipe.adapter.kind == "none":
        message = f"`fsdp.offload_trained: false` leaves nothing to `offload: {fsdp.offload}`:"
        message += " `adapter.kind: none` trains all weights"
        hint = "use `offload: none`, or delete `offload_trained`"
        yield Problem(message, "fsdp.offload_trained", hint=hint)


def check_disk_holds_frozen_weights(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``offload: disk`` in full finetuning: only weights that never change are mapped."""
    if recipe.fsdp.offload == "disk" and recipe.adapter.kind == "none":
        message = "`fsdp.offload: disk` maps frozen weights, and `adapter.kind: none` has none"
        yield Problem(message, "fsdp.offload", hint="use `offload: cpu`, or an adapter")


def check_disk_maps_a_base(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Offload to disk without a quantized base that could be mapped."""
    directory = model_directory(recipe, base_dir)
    given = directory is not None and is_base(directory)
    cached = getattr(recipe.quantization, "cache", True)
    if recipe.fsdp.offload == "disk" and not cached and not given:
        message = "`fsdp.offload: disk` maps the quantized base of the cache, and"
        message += " `quantization.cache` is false"
        hint = "delete `cache: false`, or use `offload: cpu`"
        yield Problem(message, "quantization.cache", hint=hint)


CHECKS = (
    check_strategy_has_ranks,
    check_shard_size_used,
    check_shard_size_divides,
    check_hybrid_has_groups,
    check_offloaded_activations_exist,
    check_kept_weights_are_few,
    check_disk_holds_frozen_weights,
    check_disk_maps_a_base,
)
