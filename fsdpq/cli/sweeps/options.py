"""The options of ``fsdpq sweep``: what the sweep is, and what is wanted of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

_SPEC_KEYS = {
    "strategy": "strategy.kind",
    "trials": "strategy.trials",
    "seed": "strategy.seed",
    "goal": "goal.measure",
    "direction": "goal.direction",
    "early_stopping": "early_stopping.kind",
    "min_steps": "early_stopping.min_steps",
    "min_trials": "early_stopping.min_trials",
    "zip_keys": "zip",
    "parallel": "parallel",
    "scheduler": "scheduler",
    "smoke": "smoke",
    "skip_invalid": "skip_invalid",
}
"""Option -> the key of a ``sweep.yaml`` that it sets."""

_REQUEST_KEYS = (
    "out", "only", "gpus", "retry_failed", "trust_remote_code", "lists", "array_task",
)  # fmt: skip


class _Parallel(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else click.INT.convert(value, param, ctx)


def spec_options(function: Function) -> Function:
    """Adds the options that say what the sweep is; the verb gets them as one ``changes``."""

    @functools.wraps(function)
    def with_changes(*args: Any, **kwargs: Any) -> Any:
        given = {key: kwargs.pop(name) for name, key in _SPEC_KEYS.items()}
        changes = {key: value for key, value in given.items() if value not in (None, (), False)}
        if "zip" in changes:
            changes["zip"] = [text.split(",") for text in changes["zip"]]
        return function(*args, changes=changes, **kwargs)

    return _added(with_changes, _SPEC_OPTIONS)


def request_options(function: Function) -> Function:
    """Adds the options that say what is wanted of it; the verb gets them as one ``wanted``."""

    @functools.wraps(function)
    def with_request(*args: Any, **kwargs: Any) -> Any:
        wanted = {name: kwargs.pop(name) for name in _REQUEST_KEYS}
        return function(*args, wanted=wanted, **kwargs)

    return _added(with_request, _REQUEST_OPTIONS)


def _added(function: Any, options: list[Any]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


_SPEC_OPTIONS = [
    click.option(
        "--strategy", type=click.Choice(["grid", "random", "optuna"]),
        help="Every combination (the default), some at random, or what Optuna asks for.",
    ),
    click.option("--trials", type=int, metavar="N", help="How many, for random and optuna."),
    click.option("--seed", type=int, metavar="S", help="Of random and optuna."),
    click.option(
        "--goal", metavar="MEASURE", help="What makes a trial better; default: eval_loss."
    ),
    click.option(
        "--direction", type=click.Choice(["minimize", "maximize"]),
        help="Which way of the goal is better; default: the usual one.",
    ),
    click.option(
        "--zip", "zip_keys", multiple=True, metavar="KEY,KEY",
        help="Keys that vary together: their first values, their second ones... Repeatable.",
    ),
    click.option(
        "--early-stopping", type=click.Choice(["median", "none"]),
        help="End trials whose held-out loss is above the median of the others at the same step.",
    ),
    click.option("--min-steps", type=int, metavar="N", help="No trial ends before this step."),
    click.option(
        "--min-trials", type=int, metavar="N", help="Compare a trial with so many others at least."
    ),
    click.option(
        "--parallel", type=_Parallel(), metavar="N|auto",
        help="Trials that run at the same time, each on GPUs of its own; default: 1.",
    ),
    click.option(
        "--scheduler", type=click.Choice(["local", "slurm"]),
        help="Run trials here (the default), or as an array of Slurm's.",
    ),
    click.option(
        "--smoke", is_flag=True, help="Try each trial in a minute, as `fsdpq train --smoke`."
    ),
    click.option(
        "--skip-invalid", is_flag=True, help="Leave out combinations that make no valid recipe."
    ),
]  # fmt: skip

_REQUEST_OPTIONS = [
    click.option(
        "--out", type=click.Path(path_type=Path),
        help="Directory of the sweep; default: one in sweeps/ that the same sweep always has.",
    ),
    click.option(
        "--gpus", metavar="GPUS",
        help="Skip trials that by plan do not fit on these: 2x24GiB, 1xRTX4090; default: the GPUs "
        "of this machine.",
    ),
    click.option("--only", multiple=True, metavar="ID", help="Run this trial. Repeatable."),
    click.option("--retry-failed", is_flag=True, help="Run trials again that failed."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the Python code that the model brings."
    ),
    click.option(
        "--list", "lists", is_flag=True,
        help="Show the trials, and what became or will become of them; run nothing.",
    ),
    click.option("--array-task", is_flag=True, hidden=True),
]  # fmt: skip
