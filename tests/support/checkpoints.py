"""Checkpoints for the front half, which reads their manifests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsdpq.recipe.root import Recipe
from fsdpq.tensor_files.checkpoint_manifest import (
    INDEX_NAME,
    STATE_NAME,
    SavedCheckpoint,
    SavedFile,
    step_directory,
    write_manifest,
)


def save_manifest(
    folder: Path, step: int, *, recipe: Recipe | None = None, **changes: Any
) -> SavedCheckpoint:
    """Writes a checkpoint that consists of its manifest."""
    directory = step_directory(folder, step)
    directory.mkdir(parents=True)
    empty = SavedFile(0, "0" * 64)
    fields: dict[str, Any] = {
        "step": step, "tokens": 100 * step, "world_size": 2, "eval_loss": None, "created": 1.0,
        "recipe": {} if recipe is None else recipe.model_dump(mode="json"),
        "data_digest": "d1 of 24 rows, shuffled",
        "base": {"sha256": "b1", "revision": None, "source": "here"},
        "files": {INDEX_NAME: empty, STATE_NAME: empty},
    }  # fmt: skip
    saved = SavedCheckpoint(**(fields | changes))
    write_manifest(directory, saved)
    return saved
