"""The whole recipe, and its JSON Schema."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from fsdpq.recipe.base_sections import AdapterOptions, ModelOptions, QuantizationOptions
from fsdpq.recipe.options import Options
from fsdpq.recipe.run_sections import (
    DataOptions,
    ExportOptions,
    FsdpOptions,
    LaunchOptions,
    MetricsOptions,
    OptimizerOptions,
    ScheduleOptions,
    TrainingOptions,
)

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


class Recipe(Options):
    """One validated recipe."""

    version: Literal[1]
    """Version of the recipe format."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, examples=["my-run"])
    """Name of the run; its directory starts with it."""

    description: str = ""
    """What this recipe is for, in a sentence."""

    model: ModelOptions
    """The base model."""

    quantization: QuantizationOptions
    """How the base model is quantized."""

    adapter: AdapterOptions
    """What is trained."""

    fsdp: FsdpOptions = FsdpOptions()
    """How it is sharded."""

    data: DataOptions
    """What it is trained on."""

    optimizer: OptimizerOptions
    """How the weights are updated."""

    lr_scheduler: ScheduleOptions
    """How the learning rate moves."""

    training: TrainingOptions
    """How long and in what batches."""

    export: ExportOptions = ExportOptions()
    """What the run leaves behind."""

    metrics: MetricsOptions = MetricsOptions()
    """What is measured and shown."""

    launch: LaunchOptions = LaunchOptions()
    """On which processes and devices."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe (draft 2020-12), for editors and tests."""
    schema = Recipe.model_json_schema()
    return {"$schema": SCHEMA_ID, **schema}


def recipe_schema_text() -> str:
    """Returns the committed text of ``schemas/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
