"""Rules that no single field can check, one ``check_*`` function each, one module a topic.

A check takes the recipe and the directory that its relative paths start from, and yields Problems
that name a key; `fsdpq.recipe.load` adds where it was written. A setting that would be ignored is a
Problem, not a warning. A value that equals its default counts as not given, so that a resolved
recipe, which spells out every default, is valid where its source is. `CHECKS` lists the checks in
order, `NOTICES` the functions that yield what is worth knowing and no mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks import (
    adapter,
    attention,
    batch,
    data,
    evaluation,
    formats,
    kernels,
    launch,
    loss,
    model,
    output,
    precision,
    quantization,
    schedule,
    sharding,
    streaming,
)
from fsdpq.recipe.root import Recipe

Check = Callable[[Recipe, Path], Iterator[Problem]]
"""Takes the recipe and the directory that its relative paths start from."""

Note = Callable[[Recipe, Path], Iterator[str]]
"""Takes the same and yields sentences."""


CHECKS: tuple[Check, ...] = (
    *model.CHECKS,
    *precision.CHECKS,
    *attention.CHECKS,
    *kernels.CHECKS,
    *quantization.CHECKS,
    *adapter.CHECKS,
    *sharding.CHECKS,
    *data.CHECKS,
    *formats.CHECKS,
    *loss.CHECKS,
    *streaming.CHECKS,
    *batch.CHECKS,
    *schedule.CHECKS,
    *evaluation.CHECKS,
    *output.CHECKS,
    *launch.CHECKS,
)

NOTICES: tuple[Note, ...] = (*adapter.NOTICES, *batch.NOTICES, *output.NOTICES)
