"""What a ``sweep.yaml`` says, and its JSON Schema.

The same document is made of a command line (`fsdpq.sweep.choosing.spec`), so that a sweep is one
thing however it was asked for, and can be written down and run again.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from fsdpq.recipe.options import Options
from fsdpq.recipe.root import SCHEMA_ID
from fsdpq.sweep.choosing.options import (
    EarlyStoppingOptions,
    GoalOptions,
    GridOptions,
    NoStoppingOptions,
    StrategyOptions,
)

SPEC_VERSION = 1
"""Version of the format of ``sweep.yaml``."""

Scalar = bool | int | float | str | None
Values = Scalar | tuple[Scalar | tuple[Scalar, ...], ...]
"""A text in the grammar of the command line, one value, or a list of values."""


class SweepSpec(Options):
    """One sweep; ``sweep`` and ``recipe`` are required."""

    sweep: Literal[1]
    """Version of the format."""

    name: str = Field(
        default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=100, examples=["ranks"]
    )
    """Name of the sweep; its directory starts with it. Empty takes the recipe's file name."""

    recipe: str | tuple[str, ...] = Field(
        min_length=1, examples=["recipe.yaml", "glob(recipes/*-qlora-*)"]
    )
    """The recipe's file, relative to this one; a list of files or `glob(...)` tries each."""

    parameters: dict[str, Values] = Field(
        default={}, examples=[{"adapter.rank": [8, 16], "optimizer.lr": "interval(1e-5,1e-3)"}]
    )
    """What is varied: keys of the recipe, and for each a list of values or a text in Hydra's
    grammar: `8,16`, `choice(8,16)`, `range(1,8)`, `interval(1e-5,1e-3)`,
    `tag(log,interval(1e-5,1e-3))`. The name of a section varies its `kind`."""

    zip: tuple[tuple[str, ...], ...] = Field(
        default=(), examples=[[["adapter.rank", "adapter.alpha"]]]
    )
    """Groups of keys that vary together: their first values, their second ones, and so on."""

    overrides: tuple[str, ...] = Field(default=(), examples=[["training.steps=100"]])
    """What all trials have in common over the recipe, as on the command line."""

    strategy: StrategyOptions = GridOptions.model_construct(kind="grid")
    """Which of the possible trials are run."""

    goal: GoalOptions = GoalOptions.model_construct()
    """What makes a trial better than another."""

    early_stopping: EarlyStoppingOptions = NoStoppingOptions.model_construct(kind="none")
    """When a trial is ended because others are better."""

    parallel: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = 1
    """How many trials run at the same time; `auto` is as many as the GPUs hold, each trial with as
    many as it uses."""

    scheduler: Literal["local", "slurm"] = "local"
    """Where trials run: on this machine, or as an array of Slurm's."""

    smoke: bool = False
    """Only try each trial in a minute, as `fsdpq train --smoke`."""

    skip_invalid: bool = False
    """Leave out combinations that make no valid recipe; else one of them refuses the sweep."""


def sweep_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a ``sweep.yaml`` (draft 2020-12), for editors and tests."""
    return {"$schema": SCHEMA_ID, **SweepSpec.model_json_schema()}


def sweep_schema_text() -> str:
    """Returns the committed text of ``schemas/sweep.schema.json``."""
    return json.dumps(sweep_schema(), indent=2, ensure_ascii=False) + "\n"
