"""The sections of a ``sweep.yaml``: how trials are chosen, compared and given up.

They are Options like those of a recipe: a field's docstring is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options

MAX_TRIALS = 10_000
"""A sweep has at most so many trials."""


class GridOptions(Options):
    """Every combination of the values."""

    kind: Literal["grid"]
    """Every combination; intervals have no values to combine, so they need `random` or `optuna`."""


class RandomOptions(Options):
    """So many combinations, drawn at random."""

    kind: Literal["random"]
    """Combinations drawn at random, all different."""

    trials: int = Field(ge=1, le=MAX_TRIALS, examples=[20])
    """How many; a larger number later keeps the trials of the smaller one and adds to them."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Other trials for another number, the same ones for the same."""


class OptunaOptions(Options):
    """Trials that Optuna asks for, each after what the earlier ones came to."""

    kind: Literal["optuna"]
    """Optuna's sampler decides what to try next; needs `pip install 'fsdpq[sweep]'`."""

    trials: int = Field(ge=1, le=MAX_TRIALS, examples=[20])
    """How many, those of an earlier start included."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the sampler. The same seed gives the same sweep, also where it was cut off in between.
    `parallel` trials are chosen at once, before any of them has a result, so another number gives
    other trials."""


StrategyOptions = Annotated[
    GridOptions | RandomOptions | OptunaOptions, Field(discriminator="kind")
]
"""Which of the possible trials are run."""


class GoalOptions(Options):
    """What makes a trial better than another."""

    measure: str = Field(
        default="eval_loss", pattern=r"^[A-Za-z0-9][A-Za-z0-9_./,-]*$", max_length=200,
        examples=["eval_loss"],
    )  # fmt: skip
    """A column of the results: `eval_loss`, `best_eval_loss`, `perplexity`, `train_loss`,
    `tokens_per_s`, `peak_memory_bytes`, or `tasks.<task>.<metric>` of the evaluation."""

    direction: Literal["minimize", "maximize", "auto"] = "auto"
    """Which way is better. `auto`: more `tokens_per_s` and more of a task's metric, less of
    everything else."""


class NoStoppingOptions(Options):
    """Every trial is trained to its end."""

    kind: Literal["none"]
    """Every trial is trained to its end."""


class MedianStoppingOptions(Options):
    """Trials that are worse than most others at the same step are ended."""

    kind: Literal["median"]
    """A trial ends early when its best loss so far is worse than the median of what the others had
    reached by the same step. It counts as `hopeless` and is not tried again."""

    min_steps: int = Field(default=10, ge=1, lt=2**31)
    """No trial ends before it has made so many steps."""

    min_trials: int = Field(default=3, ge=1, le=MAX_TRIALS)
    """So many other trials must have got as far before one is compared with them."""


EarlyStoppingOptions = Annotated[
    NoStoppingOptions | MedianStoppingOptions, Field(discriminator="kind")
]
"""When a trial is ended because others are better."""
