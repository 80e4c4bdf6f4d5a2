"""Which settings a run can change when it goes on from a checkpoint, and which make it another run.

Every key of a recipe belongs to one class. A `Class.RUN` key changes what is computed from here
on; a run that went on with another value would be neither of the two runs. A `Class.FREE` key
changes where, how fast and in what pieces the same thing is computed, or what is written on the
way. Keys that name rows or the base are judged by what they lead to: the same rows under another
path are the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fsdpq.errors import CheckpointError
from fsdpq.recipe.difference import Difference, compare
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.view import View


class Class(Enum):
    """What it means that a key changed."""

    RUN = "run"
    """Another run: refused, unless forced."""

    ROWS = "rows"
    """Another run where the prepared rows are others (their digest), or are not prepared ahead."""

    BASE = "base"
    """Another run where the base model is another (the hash of its files)."""

    FREE = "free"
    """The same run."""


CLASSES: dict[str, Class] = {
    "version": Class.FREE,
    "name": Class.FREE,
    "description": Class.FREE,
    "model.name_or_path": Class.BASE,
    "model.revision": Class.BASE,
    "model.dtype": Class.RUN,
    "model.attn_implementation": Class.FREE,
    "model.use_liger_kernel": Class.FREE,
    "quantization.*": Class.RUN,
    "quantization.cache": Class.FREE,
    "adapter.*": Class.RUN,
    "fsdp.strategy": Class.FREE,
    "fsdp.shard_size": Class.FREE,
    "fsdp.offload": Class.FREE,
    "fsdp.offload_trained": Class.FREE,
    "fsdp.precision": Class.RUN,
    "fsdp.activation_checkpointing": Class.FREE,
    "fsdp.activation_offload": Class.FREE,
    "fsdp.no_sync": Class.FREE,
    "data.*": Class.ROWS,
    "data.shuffle": Class.RUN,
    "data.streaming": Class.RUN,
    "data.stream_window": Class.RUN,
    "optimizer.*": Class.RUN,
    "lr_scheduler.*": Class.RUN,
    "training.steps": Class.RUN,
    "training.epochs": Class.RUN,
    "training.global_batch_size": Class.RUN,
    "training.gradient_accumulation_steps": Class.FREE,
    "training.micro_batch_size": Class.FREE,
    "training.layer_chunks": Class.FREE,
    "training.router_aux_loss_coef": Class.RUN,
    "training.max_grad_norm": Class.RUN,
    "training.seed": Class.RUN,
    "training.compile": Class.FREE,
    "training.eval_interval": Class.FREE,
    "checkpoint.*": Class.FREE,
    "evaluation.*": Class.FREE,
    "export.*": Class.FREE,
    "metrics.*": Class.FREE,
    "launch.*": Class.FREE,
}
"""Dotted key -> its class; ``section.*`` is what the section's other keys are.

``training.gradient_accumulation_steps`` is free because a resolved recipe counts its rows in
``training.global_batch_size``.
"""


def class_of(key: str) -> Class:
    """Returns the class of a dotted key; a nested key (``fsdp.precision.param``) has its parent's.

    Raises:
        KeyError: the table has no such key.
    """
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        known = ".".join(parts[:length])
        if known in CLASSES:
            return CLASSES[known]
    return CLASSES[f"{parts[0]}.*"]


def hash_run(recipe: Recipe) -> str:
    """Returns a hash, in hex, of all that makes a resolved recipe another run."""
    values = View(Path(), Path(), recipe, Marks({}, {})).values()
    dotted = {".".join(str(part) for part in path): value for path, value in values.items()}
    kept = {key: value for key, value in dotted.items() if class_of(key) is not Class.FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_saved_recipe(saved: Mapping[str, Any], source: str) -> Recipe:
    """Returns the resolved recipe that a checkpoint was made with.

    Args:
        saved: as plain data.
        source: where it stands, for messages.

    Raises:
        CheckpointError: this version of fsdpq cannot read it.
    """
    try:
        return Recipe.model_validate_json(json.dumps(saved), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"the recipe in {source} cannot be read: `{place}`: {first['msg']}"
        hint = "go on with the version of fsdpq that saved it, or start a new run"
        raise CheckpointError(message, hint=hint) from None


def list_changes(old: View, new: View, *, same_rows: bool, same_base: bool) -> Iterator[Difference]:
    """Yields the keys of two resolved recipes that differ and make another run, in their order.

    Args:
        old: what the checkpoint was made with.
        new: what is to run.
        same_rows: the rows are known to be the same, so that the keys that name them do not matter.
        same_base: the same for the base model.
    """
    settled = {Class.FREE}
    settled |= {Class.ROWS} if same_rows else set()
    settled |= {Class.BASE} if same_base else set()
    for difference in compare(old, new):
        if class_of(difference.key) not in settled:
            yield difference
