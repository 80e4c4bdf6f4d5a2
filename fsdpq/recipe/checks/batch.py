"""Rules about batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect, is_default, num_ranks
from fsdpq.recipe.root import Recipe

GLOBAL = "training.global_batch_size"
MICRO = "training.micro_batch_size"


def check_one_batch_size(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Both ``global_batch_size`` and ``gradient_accumulation_steps``."""
    training = recipe.training
    if training.global_batch_size is not None and training.gradient_accumulation_steps is not None:
        message = "`training` has both `global_batch_size` and `gradient_accumulation_steps`"
        key = "training.gradient_accumulation_steps"
        yield Problem(message, key, hint=f"delete one of them (on the command line: `{key}=null`)")


def check_batch_divides(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A global batch that does not divide into the ranks, or into their micro-batches."""
    rows, ranks, micro = _written_rows(recipe), num_ranks(recipe), recipe.training.micro_batch_size
    if rows is None or ranks is None:
        return
    if rows % ranks:
        message = f"`{GLOBAL}: {rows}` does not divide into {ranks} ranks: some would wait for"
        yield Problem(f"{message} others", GLOBAL, hint=f"use {_near(rows, ranks)}")
    elif rows // ranks > micro and rows // ranks % micro:
        message = f"`{GLOBAL}: {rows}` is {rows // ranks} rows on each of {ranks} ranks, which"
        fitting = next(size for size in range(micro, 0, -1) if rows // ranks % size == 0)
        hint = f"use `global_batch_size` {_near(rows, ranks * micro)}, or "
        hint += f"`micro_batch_size: {fitting}`"
        yield Problem(f"{message} are no whole micro-batches of {micro}", GLOBAL, hint=hint)


def check_micro_batch_is_filled(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A ``micro_batch_size`` larger than the rows of a whole step."""
    rows, micro = _written_rows(recipe), recipe.training.micro_batch_size
    if rows is not None and micro > rows and not is_default(recipe.training, "micro_batch_size"):
        message = f"`{MICRO}: {micro}` is never reached: a step has {rows} rows"
        yield Problem(message, MICRO, hint=f"use `micro_batch_size: {rows}` or less")


def check_layer_chunks_divide(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``layer_chunks`` that do not divide the rows of a micro-batch."""
    chunks, micro = recipe.training.layer_chunks, recipe.training.micro_batch_size
    if micro % chunks:
        divisors = [str(n) for n in range(1, micro + 1) if micro % n == 0]
        message = f"`training.layer_chunks: {chunks}` does not divide `micro_batch_size: {micro}`"
        hint = f"use one of {', '.join(divisors)}, or another `micro_batch_size`"
        yield Problem(message, "training.layer_chunks", hint=hint)


def check_no_sync_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``no_sync`` with one rank, or with one micro-batch a step: nothing is reduced twice."""
    ranks, training = num_ranks(recipe), recipe.training
    steps = training.gradient_accumulation_steps
    if steps is None and ranks is not None and training.global_batch_size is not None:
        steps = -(-training.global_batch_size // (ranks * training.micro_batch_size))
    if ranks == 1:
        yield from has_no_effect(recipe, "fsdp", "no_sync", "with one rank")
    elif steps == 1:
        hint = "delete it, or lower `training.micro_batch_size`"
        yield from has_no_effect(recipe, "fsdp", "no_sync", "with one micro-batch a step", hint)


def note_chunks_are_padded(recipe: Recipe, _base_dir: Path) -> Iterator[str]:
    """``layer_chunks`` without packing: all chunks are as wide as the micro-batch's longest row."""
    training = recipe.training
    if training.layer_chunks > 1 and recipe.data.packing == "none":
        yield (
            f"rows are padded to the longest of {training.micro_batch_size} in a micro-batch, in "
            "all chunks of `training.layer_chunks`: `data.packing: best_fit` leaves out the padding"
        )


def _written_rows(recipe: Recipe) -> int | None:
    """Returns the rows of a step where the recipe says them."""
    training = recipe.training
    return training.global_batch_size if training.gradient_accumulation_steps is None else None


def _near(rows: int, unit: int) -> str:
    """Returns the multiples of ``unit`` around ``rows``."""
    below, above = rows // unit * unit, -(-rows // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


CHECKS = (
    check_one_batch_size,
    check_batch_divides,
    check_micro_batch_is_filled,
    check_layer_chunks_divide,
    check_no_sync_used,
)
NOTICES = (note_chunks_are_padded,)
