"""Rules about ``evaluation``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect
from fsdpq.recipe.checks.quantization import repeated
from fsdpq.recipe.root import Recipe


def check_tasks_differ(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A task of ``evaluation.tasks`` that is listed twice."""
    yield from repeated(recipe.evaluation.tasks, "evaluation.tasks")


def check_tasks_are_named(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Settings of ``evaluation`` without a task."""
    if recipe.evaluation.tasks:
        return
    for field in ("num_fewshot", "limit", "batch_size", "apply_chat_template"):
        hint = f"add `tasks: [hellaswag]` to `evaluation`, or delete `{field}`"
        yield from has_no_effect(recipe, "evaluation", field, "without `evaluation.tasks`", hint)


CHECKS = (check_tasks_differ, check_tasks_are_named)
