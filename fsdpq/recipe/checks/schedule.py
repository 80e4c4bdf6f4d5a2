"""Rules about how long a run is, and about ``optimizer`` and ``lr_scheduler``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.lr_scheduler import LinearScheduleOptions, WsdScheduleOptions
from fsdpq.recipe.sections.optimizer import AdamWOptions, SgdOptions


def check_one_duration(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Both ``training.steps`` and ``training.epochs``."""
    if recipe.training.steps is not None and recipe.training.epochs is not None:
        hint = "delete one of them (on the command line: `training.epochs=null`)"
        yield Problem("`training` has both `steps` and `epochs`", "training.epochs", hint=hint)


def check_one_warmup(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Both ``warmup_steps`` and ``warmup_ratio``."""
    schedule = recipe.lr_scheduler
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        message = "`lr_scheduler` has both `warmup_steps` and `warmup_ratio`"
        hint = "delete one of them (on the command line: `lr_scheduler.warmup_ratio=null`)"
        yield Problem(message, "lr_scheduler.warmup_ratio", hint=hint)


def check_warmup_fits(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A warmup that does not end before the training does."""
    steps, schedule = recipe.training.steps, recipe.lr_scheduler
    if steps is None or schedule.num_warmup_steps(steps) < steps:
        return
    if schedule.warmup_ratio is None:
        message = f"`lr_scheduler.warmup_steps` is {schedule.warmup_steps} and `training.steps` is"
        hint = f"the warmup must end earlier: about {steps // 10} steps"
        yield Problem(f"{message} {steps}", "lr_scheduler.warmup_steps", hint=hint)
    elif schedule.warmup_ratio > 0:
        message = f"`lr_scheduler.warmup_ratio: {schedule.warmup_ratio:g}` is all of {steps}"
        hint = "lower it, or raise `training.steps`"
        yield Problem(f"{message} steps", "lr_scheduler.warmup_ratio", hint=hint)


def check_one_decay(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """The schedule wsd with both ``decay_steps`` and ``decay_ratio``."""
    schedule = recipe.lr_scheduler
    if isinstance(schedule, WsdScheduleOptions) and None not in (
        schedule.decay_steps,
        schedule.decay_ratio,
    ):
        message = "`lr_scheduler` has both `decay_steps` and `decay_ratio`"
        hint = "delete one of them (on the command line: `lr_scheduler.decay_ratio=null`)"
        yield Problem(message, "lr_scheduler.decay_ratio", hint=hint)


def check_decay_fits(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """The schedule wsd whose warmup and decay take more steps than the training has."""
    steps, schedule = recipe.training.steps, recipe.lr_scheduler
    if steps is None or not isinstance(schedule, WsdScheduleOptions):
        return
    warmup, decay = schedule.num_warmup_steps(steps), schedule.num_decay_steps(steps)
    if warmup < steps < warmup + decay:
        key = "decay_ratio" if schedule.decay_steps is None else "decay_steps"
        message = f"`lr_scheduler` warms up for {warmup} steps and decays for {decay}, and "
        message += f"`training.steps` is {steps}"
        hint = f"the decay has room for {steps - warmup} steps: lower `{key}` or the warmup"
        yield Problem(message, f"lr_scheduler.{key}", hint=hint)


def check_schedule_moves(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A decrease to ``min_lr_ratio: 1``, which is none."""
    schedule = recipe.lr_scheduler
    decays = isinstance(schedule, LinearScheduleOptions | WsdScheduleOptions)
    if decays and schedule.min_lr_ratio == 1:
        message = f"`lr_scheduler.kind: {schedule.kind}` has no effect with `min_lr_ratio: 1`"
        hint = "use `kind: constant`, or a smaller `min_lr_ratio`"
        yield Problem(message, "lr_scheduler.min_lr_ratio", hint=hint)


def check_nesterov_has_momentum(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``nesterov`` without ``momentum``."""
    if isinstance(recipe.optimizer, SgdOptions) and recipe.optimizer.momentum == 0:
        hint = "add `momentum: 0.9`, or delete `nesterov`"
        yield from has_no_effect(recipe, "optimizer", "nesterov", "without `momentum`", hint)


def check_lora_plus_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``lora_plus_ratio`` where no low-rank matrices are trained."""
    has_ratio = isinstance(recipe.optimizer, AdamWOptions | SgdOptions)
    if has_ratio and not isinstance(recipe.adapter, LoraOptions):
        reason = f"with `adapter.kind: {recipe.adapter.kind}`"
        yield from has_no_effect(recipe, "optimizer", "lora_plus_ratio", reason)


def check_eval_has_rows(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Evaluations without rows that are held out."""
    data = recipe.data
    if recipe.training.eval_interval is not None and data.eval_fraction == 0 and data.eval is None:
        message = "`training.eval_interval` has no effect: `data.eval_fraction` is 0"
        hint = "add `eval_fraction: 0.1` or an `eval` source to `data`"
        yield Problem(message, "training.eval_interval", hint=hint)


def check_intervals_end(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """An interval of evaluations, checkpoints or log lines that is longer than the run."""
    steps = recipe.training.steps
    intervals = {
        "training.eval_interval": recipe.training.eval_interval,
        "checkpoint.interval": recipe.checkpoint.interval,
        "metrics.log_interval": recipe.metrics.log_interval,
    }
    for key, interval in intervals.items():
        if steps is not None and interval is not None and interval > steps:
            message = f"`{key}: {interval}` never comes: the run has {steps} steps"
            yield Problem(message, key, hint=f"use {steps} or less, or delete it")


CHECKS = (
    check_one_duration,
    check_one_warmup,
    check_warmup_fits,
    check_one_decay,
    check_decay_fits,
    check_schedule_moves,
    check_nesterov_has_momentum,
    check_lora_plus_used,
    check_eval_has_rows,
    check_intervals_end,
)
