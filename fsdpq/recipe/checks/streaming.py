"""Rules about ``data.streaming``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect
from fsdpq.recipe.root import Recipe


def check_stream_has_steps(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``streaming`` without ``training.steps``: an epoch's sequences are known at its end only."""
    if recipe.data.streaming and recipe.training.steps is None:
        message = "`data.streaming` needs `training.steps`: how many sequences an epoch has is "
        message += "known at its end only"
        hint = "add `steps: 1000` to `training`"
        if recipe.training.epochs is not None:
            hint += ", and delete `epochs`"
        yield Problem(message, "data.streaming", hint=hint)


def check_stream_holds_nothing_out(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``eval_fraction`` of streamed rows, which are never all at hand."""
    if recipe.data.streaming and recipe.data.eval_fraction:
        message = "`data.eval_fraction` cannot be held out of rows that are streamed"
        hint = "give rows for evaluation as `data.eval`, or delete `streaming`"
        yield Problem(message, "data.eval_fraction", hint=hint)


def check_stream_settings_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``stream_window`` without ``streaming``, and either with made-up rows."""
    if recipe.data.format == "dummy":
        for field in ("streaming", "stream_window"):
            yield from has_no_effect(recipe, "data", field, "with `data.format: dummy`")
    elif not recipe.data.streaming:
        yield from has_no_effect(recipe, "data", "stream_window", "without `data.streaming`")


CHECKS = (check_stream_has_steps, check_stream_holds_nothing_out, check_stream_settings_used)
