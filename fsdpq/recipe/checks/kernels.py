"""Rules about ``model.use_liger_kernel``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of
from fsdpq.recipe.root import Recipe

KEY = "model.use_liger_kernel"
HINT = "delete `use_liger_kernel`"


def check_liger_kernel_runs(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``use_liger_kernel`` on a CPU: its kernels are written in Triton, for GPUs."""
    if recipe.model.use_liger_kernel and recipe.launch.device == "cpu":
        message = "`use_liger_kernel` needs a GPU, and `launch.device` is `cpu`"
        yield Problem(message, KEY, hint=HINT)


def check_liger_kernel_used(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """``use_liger_kernel`` for an architecture that liger-kernel 0.8.5 has no kernels for."""
    card = card_of(recipe, base_dir)
    if recipe.model.use_liger_kernel and card is not None and not card.family.has_liger_kernels:
        message = f"`use_liger_kernel: true` has no effect on `{card.model_type}` models"
        yield Problem(f"{message}, for which Liger has no kernels", KEY, hint=HINT)


CHECKS = (check_liger_kernel_runs, check_liger_kernel_used)
