"""The whole recipe, and its JSON Schema."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from fsdpq.recipe.options import Options
from fsdpq.recipe.sections.adapter import AdapterOptions, LoraOptions
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.evaluation import EvaluationOptions
from fsdpq.recipe.sections.fsdp import FsdpOptions
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.recipe.sections.lr_scheduler import ConstantScheduleOptions, ScheduleOptions
from fsdpq.recipe.sections.model import ModelOptions
from fsdpq.recipe.sections.optimizer import AdamWOptions, OptimizerOptions
from fsdpq.recipe.sections.output import ExportOptions, MetricsOptions
from fsdpq.recipe.sections.quantization import BnbOptions, QuantizationOptions
from fsdpq.recipe.sections.training import CheckpointOptions, TrainingOptions

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
VERSION = 1
"""Version of the recipe format that this program reads; `fsdpq.recipe.migrate` knows older ones."""


class Recipe(Options):
    """One validated recipe; ``version``, ``name``, ``model`` and ``data`` are required."""

    version: Literal[1]
    """Version of the recipe format."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, examples=["my-run"])
    """Name of the run; its directory starts with it."""

    description: str = Field(default="", max_length=500)
    """What this recipe is for, in a sentence."""

    model: ModelOptions
    """The base model."""

    quantization: QuantizationOptions = BnbOptions.model_construct(kind="bnb")
    """How the base model is quantized."""

    adapter: AdapterOptions = LoraOptions.model_construct(kind="lora")
    """What is trained."""

    fsdp: FsdpOptions = FsdpOptions.model_construct()
    """How it is sharded."""

    data: DataOptions
    """What it is trained on."""

    optimizer: OptimizerOptions = AdamWOptions.model_construct(kind="adamw")
    """How the weights are updated."""

    lr_scheduler: ScheduleOptions = ConstantScheduleOptions.model_construct(kind="constant")
    """How the learning rate moves."""

    training: TrainingOptions = TrainingOptions.model_construct()
    """How long and in what batches."""

    checkpoint: CheckpointOptions = CheckpointOptions.model_construct()
    """What is saved on the way."""

    evaluation: EvaluationOptions = EvaluationOptions.model_construct()
    """Which tasks it is measured by."""

    export: ExportOptions = ExportOptions.model_construct()
    """What the run leaves behind."""

    metrics: MetricsOptions = MetricsOptions.model_construct()
    """What is measured and shown."""

    launch: LaunchOptions = LaunchOptions.model_construct()
    """On which processes and devices."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe (draft 2020-12), for editors and tests."""
    schema = Recipe.model_json_schema()
    schema["properties"]["defaults"] = {  # consumed by `fsdpq.recipe.layers`, so no field
        "description": "Base fragments below this recipe, later ones over earlier ones: names of "
        "shipped ones, or files beside the recipe (`./name.yaml`).",
        "type": "array",
        "items": {"type": "string"},
        "title": "Defaults",
    }
    return {"$schema": SCHEMA_ID, **schema}


def recipe_schema_text() -> str:
    """Returns the committed text of ``schemas/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
