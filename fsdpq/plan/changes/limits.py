"""How far a recipe can go on a machine: its longest rows, its largest micro-batch, its rank.

A plan never decreases with any of them, so the largest value that fits is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fsdpq.plan.case import Case
from fsdpq.plan.changes.moves import LENGTH_STEP, batch_settings
from fsdpq.plan.changes.settings import Settings, apply_settings, as_overrides
from fsdpq.plan.result import Limit
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions

MAX_ROWS = 1024
MAX_RANK = 4096
"""What the recipe's schema allows."""


@dataclass(frozen=True)
class _Axis:
    """A setting that can grow.

    Attributes:
        setting: ``section.field``.
        now: its value.
        settings_of: what a value of it means.
        step: values that are tried are multiples of it.
        most: the largest that makes sense.
        reason: why.
    """

    setting: str
    now: int
    settings_of: Callable[[int], Settings]
    step: int
    most: int
    reason: str


def find_limits(
    recipe: Recipe, case: Case, *, accumulation: int | None = None
) -> tuple[Limit, ...]:
    """Returns the limits of a resolved recipe, each with all else as it is.

    Args:
        recipe: resolved.
        case: model and machine; with neither GPUs nor host memory known nothing is a limit.
        accumulation: ``training.gradient_accumulation_steps`` of the recipe as it was written.
    """
    return tuple(_limit(axis, recipe, case, accumulation) for axis in _axes(recipe, case))


def _axes(recipe: Recipe, case: Case) -> Iterator[_Axis]:
    longest = case.shape.max_position_embeddings
    yield _Axis(
        "data.seq_len", recipe.data.seq_len, lambda value: (("data.seq_len", value),),
        LENGTH_STEP, longest, f"the model was made for {longest:,} tokens",
    )  # fmt: skip
    yield _Axis(
        "training.micro_batch_size", workload_of(recipe).rows,
        lambda value: batch_settings(recipe, value), recipe.training.layer_chunks, MAX_ROWS,
        "more were not tried",
    )  # fmt: skip
    if isinstance(recipe.adapter, LoraOptions):
        most = min(MAX_RANK, case.shape.hidden_size)
        yield _Axis(
            "adapter.rank", recipe.adapter.rank, lambda value: (("adapter.rank", value),),
            1, most, "the matrices have no higher rank",
        )  # fmt: skip


def _limit(axis: _Axis, recipe: Recipe, case: Case, accumulation: int | None) -> Limit:
    def fits(value: int) -> bool:
        changed = apply_settings(recipe, axis.settings_of(value))
        return not case.shortages(changed, case.memory(changed))

    value = _bisect(fits, step=axis.step, most=axis.most)
    if value is None:
        return Limit(axis.setting, axis.now, None, bound="the smallest does not fit either")
    settings = axis.settings_of(value)
    changed = apply_settings(recipe, settings)
    memory = case.memory(changed)
    return Limit(
        setting=axis.setting,
        now=axis.now,
        value=value,
        settings=as_overrides(settings, accumulation, changed),
        bound="memory" if value + axis.step <= axis.most else axis.reason,
        peak_bytes=memory.peak_bytes,
        tokens_per_s=case.time(changed, memory).tokens_per_s,
    )


def _bisect(fits: Callable[[int], bool], *, step: int, most: int) -> int | None:
    """Returns the largest multiple of ``step`` up to ``most`` that fits, None where none does."""
    low, high = 0, max(1, most // step)
    if fits(high * step):
        return high * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step or None
