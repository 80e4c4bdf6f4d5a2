"""A recipe beside itself under every strategy, offload and sort of checkpointing."""

from __future__ import annotations

from itertools import product

from fsdpq.plan.case import Case
from fsdpq.plan.changes.settings import Settings, apply_settings, as_overrides, problems_of
from fsdpq.plan.result import Variant
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe

STRATEGIES = ("ddp", "shard_grad_op", "full_shard")
OFFLOADS = ("none", "cpu", "disk")
CHECKPOINTING = ("none", "full")


def list_variants(
    recipe: Recipe, case: Case, *, accumulation: int | None = None
) -> tuple[Variant, ...]:
    """Returns the recipe as it is, and every other variant that its rules allow.

    Args:
        recipe: resolved.
        case: model and machine.
        accumulation: ``training.gradient_accumulation_steps`` of the recipe as it was written.
    """
    fsdp, ranks = recipe.fsdp, workload_of(recipe).num_ranks
    strategies = STRATEGIES if ranks > 1 else ("full_shard",)
    if fsdp.strategy not in strategies:
        strategies = (*strategies, fsdp.strategy)
    checkpointing = CHECKPOINTING
    if fsdp.activation_checkpointing not in checkpointing:
        checkpointing = (*checkpointing, fsdp.activation_checkpointing)
    known = problems_of(recipe, case.base_dir)
    found: list[Variant] = []
    for strategy, offload, kept in product(strategies, OFFLOADS, checkpointing):
        settings = _settings(recipe, strategy, offload, kept)
        changed = apply_settings(recipe, settings)
        if not problems_of(changed, case.base_dir) - known:
            overrides = as_overrides(settings, accumulation, changed)
            found.append(_variant(changed, overrides, case))
    return tuple(found)


def _settings(recipe: Recipe, strategy: str, offload: str, kept: str) -> Settings:
    """Returns what differs, with what would have no effect under it put back to its default."""
    fsdp = recipe.fsdp
    wanted: dict[str, object] = {
        "strategy": strategy, "offload": offload, "activation_checkpointing": kept,
    }  # fmt: skip
    if not strategy.startswith("hybrid"):
        wanted["shard_size"] = None
    if offload == "none":
        wanted["offload_trained"] = True
    if kept == "none":
        wanted["activation_offload"] = False
    return tuple(
        (f"fsdp.{name}", value) for name, value in wanted.items() if getattr(fsdp, name) != value
    )


def _variant(recipe: Recipe, overrides: tuple[str, ...], case: Case) -> Variant:
    memory = case.memory(recipe)
    return Variant(
        strategy=recipe.fsdp.strategy,
        offload=recipe.fsdp.offload,
        activation_checkpointing=recipe.fsdp.activation_checkpointing,
        settings=overrides,
        peak_bytes=memory.peak_bytes,
        host_bytes=memory.host_bytes,
        fits=case.fits(recipe, memory),
        tokens_per_s=case.time(recipe, memory).tokens_per_s,
    )
