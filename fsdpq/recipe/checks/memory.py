"""Arithmetic on runs that no machine can hold; the exact plan is another matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, num_ranks
from fsdpq.recipe.precision import precision_options
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import AdamW8bitOptions, MuonOptions, SgdOptions

GPU_BYTES = 80e9
"""Memory of a large GPU; full finetuning that needs more a rank is refused."""

GPUS_PER_NODE = 8
"""Ranks of a machine where the recipe leaves the number to it."""


def check_full_finetuning_fits(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Full finetuning of a model whose weights, gradients and optimizer state fit nowhere.

    AdamW in fp32 needs 16 bytes a weight: the weight, its gradient and two running means.
    """
    card = card_of(recipe, base_dir)
    in_host_memory = recipe.fsdp.offload != "none" or recipe.launch.device == "cpu"
    if card is None or recipe.adapter.kind != "none" or in_host_memory:
        return
    ranks = num_ranks(recipe) or GPUS_PER_NODE * recipe.launch.nnodes
    shards = _ranks_per_copy(recipe, ranks)
    weight_bytes = _bytes_per_weight(recipe)
    needed = card.num_parameters * weight_bytes / shards
    if needed > GPU_BYTES:
        billions = f"{card.num_parameters / 1e9:.1f} billion weights"
        message = f"`adapter.kind: none` needs {needed / 1e9:.0f} GB a rank ({billions} x"
        message += f" {weight_bytes} bytes, sharded over {shards}) and a large GPU has 80 GB"
        hint = "use `adapter: {kind: lora}`, `fsdp.offload: cpu`, or at least "
        hint += f"{_at_least(card.num_parameters * weight_bytes)} ranks that share one copy"
        yield Problem(message, "adapter.kind", hint=hint)


def _ranks_per_copy(recipe: Recipe, ranks: int) -> int:
    strategy = recipe.fsdp.strategy
    if strategy == "ddp":
        return 1
    if not strategy.startswith("hybrid"):
        return ranks
    default = ranks // recipe.launch.nnodes if recipe.launch.nnodes > 1 else max(1, ranks // 2)
    return min(ranks, recipe.fsdp.shard_size or default)


def _bytes_per_weight(recipe: Recipe) -> int:
    """Returns the bytes of a trained weight, its gradient and its optimizer state."""
    element = 2 if precision_options(recipe.fsdp).param == "bf16" else 4
    optimizer = recipe.optimizer
    if isinstance(optimizer, AdamW8bitOptions):
        return element * 2 + 2
    if isinstance(optimizer, SgdOptions | MuonOptions):
        return element * (3 if optimizer.momentum else 2)
    return element * 4


def _at_least(num_bytes: float) -> int:
    return int(-(-num_bytes // GPU_BYTES))


CHECKS = (check_full_finetuning_fits,)
