"""How many steps a run has, and the loaders that deal its rows to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from fsdpq import dist
from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.dealing.loader import STEPS_AHEAD, Deal, Loader, RowOrder, row_sizes
from fsdpq.data.dealing.prefetch import Prefetch
from fsdpq.data.text.tokenize import Row
from fsdpq.errors import Problem, RecipeError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.recipe.root import Recipe
from fsdpq.training.step import evaluate


def count_rows(recipe: Recipe, num_train_rows: int) -> int | None:
    """Returns the rows of the whole run, None where ``training.steps`` says how long it is.

    A fraction of an epoch is rounded to whole rows, and to one at least.
    """
    if recipe.training.steps is not None:
        return None
    return max(1, round((recipe.training.epochs or 1.0) * num_train_rows))


def count_steps(recipe: Recipe, num_train_rows: int) -> int:
    """Returns the optimizer steps of the run; the last one takes what rows are left.

    Raises:
        RecipeError: warmup and decay take more steps than that.
    """
    num_rows = count_rows(recipe, num_train_rows)
    if num_rows is None:
        return recipe.training.steps or 0
    steps = math.ceil(num_rows / rows_per_step(recipe))
    warmup = recipe.lr_scheduler.num_warmup_steps(steps)
    if warmup >= steps:
        message = f"`lr_scheduler.warmup_steps` is {warmup}, and {num_train_rows} rows make "
        message += f"{steps} steps"
        hint = "lower `lr_scheduler.warmup_steps`, or raise `training.epochs`"
        raise RecipeError([Problem(message, "lr_scheduler.warmup_steps", None, hint)])
    decay = recipe.lr_scheduler.num_decay_steps(steps)
    if warmup + decay > steps:
        message = f"`lr_scheduler` warms up for {warmup} steps and decays for {decay}, and "
        message += f"{num_train_rows} rows make {steps} steps"
        hint = "lower `lr_scheduler.decay_steps` or the warmup, or raise `training.epochs`"
        raise RecipeError([Problem(message, "lr_scheduler", None, hint)])
    return steps


def rows_per_step(recipe: Recipe) -> int:
    """Returns the rows of a step over all ranks; the launcher made the number concrete."""
    size = recipe.training.global_batch_size
    if size is None:
        raise RuntimeError("`training.global_batch_size` is null: this recipe is not resolved")
    return size


def open_loader(
    recipe: Recipe, order: RowOrder, num_train_rows: int, device: torch.device
) -> Loader:
    """Returns the loader of this rank's training steps, its first step built.

    Close it to end its threads. The ranks compare what their steps follow from: with other rows or
    another number of steps one of them would wait for the others without end.

    Ranks: all (collective).

    Args:
        recipe: the recipe.
        order: the rows of training.
        num_train_rows: those of one epoch.
        device: this rank's device.

    Raises:
        RecipeError: streamed rows cannot be used.
        TrainingError: a rank has other rows, another order or another number of steps.
    """
    num_rows = count_rows(recipe, num_train_rows)
    agreed = (order.digest, order.seed, rows_per_step(recipe), num_rows, recipe.training.steps)
    dist.check_same_on_all_ranks("the training steps", repr(agreed))
    deal = Deal(
        rows_per_step(recipe),
        recipe.training.micro_batch_size,
        dist.rank(),
        dist.world_size(),
        num_rows,
    )
    loader = Loader(order, deal, pin_to=device if device.type == "cuda" else None)
    loader.start()
    return loader


def build_evaluation(
    recipe: Recipe,
    model: CausalLM,
    held_out: Sequence[Row],
    device: torch.device,
    breaks_off: Callable[[], bool] = lambda: False,
) -> Callable[[], float | None] | None:
    """Returns what computes the held-out loss; None where no rows are held out.

    Args:
        recipe: resolved.
        model: sharded and loaded.
        held_out: rows.
        device: this rank's.
        breaks_off: asked before every micro-batch, on all ranks; where it says so there is no loss.
    """
    if not held_out:
        return None
    micro_batch_size = recipe.training.micro_batch_size

    def compute() -> float | None:
        steps = iterate_held_out(held_out, micro_batch_size=micro_batch_size)
        with Prefetch(steps, depth=STEPS_AHEAD, name="fsdpq-held-out") as ahead:
            going = _Going(ahead, breaks_off)
            loss = evaluate(model, going, device=device)
        return None if going.broken_off else loss

    return compute


class _Going:
    """Yields steps until something breaks off."""

    def __init__(self, steps: Iterable[Step], breaks_off: Callable[[], bool]) -> None:
        self._steps, self._breaks_off = steps, breaks_off
        self.broken_off = False

    def __iter__(self) -> Iterator[Step]:
        for step in self._steps:
            self.broken_off = self._breaks_off()
            if self.broken_off:
                return
            yield step


def iterate_held_out(rows: Sequence[Row], *, micro_batch_size: int) -> Iterator[Step]:
    """Yields this rank's part of the held-out rows, shortest first, one micro-batch a step."""
    size = micro_batch_size * dist.world_size()
    shortest_first = np.argsort(row_sizes(rows)[0], kind="stable").tolist()
    for start in range(0, len(rows), size):
        yield build_step(
            [rows[index] for index in shortest_first[start : start + size]],
            micro_batch_size=micro_batch_size,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
