"""Trials on disk: a complete recipe each, and what makes them differ, in ``trials.json``.

A trial that was frozen stays: a sweep that is run again with more values adds to them. What a
frozen recipe says is what its id stands for, so one that was edited is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdpq.errors import CheckpointError, UsageError
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.trial import Trial

FORMAT_VERSION = 1
"""Version of the format of ``trials.json``."""


def freeze(files: SweepFiles, trials: Sequence[Trial]) -> list[Trial]:
    """Writes the trials that are not there yet, and returns all that are, the new ones last.

    Args:
        files: the sweep directory; made where it is missing.
        trials: of the sweep.

    Raises:
        CheckpointError: ``trials.json`` cannot be read.
        UsageError: a frozen recipe was changed.
    """
    entries = _read_entries(files)
    known = {entry["id"]: entry for entry in entries}
    _check_recipes(files, entries)
    files.trials.parent.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        if trial.id in known:
            continue
        text = f"{_headline(trial)}{dump_recipe(trial.recipe)}".encode()
        path = files.recipe(trial.id)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, text)
        known[trial.id] = _entry(trial, hashlib.sha256(text).hexdigest())
    if len(known) > len(entries):
        content = {"version": FORMAT_VERSION, "trials": list(known.values())}
        write_whole(files.trials, (json.dumps(content, ensure_ascii=False) + "\n").encode())
    return [_trial(entry) for entry in known.values()]


def read_frozen(files: SweepFiles) -> list[Trial]:
    """Returns the frozen trials in order; none where nothing was frozen.

    Raises:
        CheckpointError: ``trials.json`` cannot be read.
    """
    return [_trial(entry) for entry in _read_entries(files)]


def _headline(trial: Trial) -> str:
    words = f"trial {trial.id} of {trial.source}: {trial.label or 'as it is'}"
    return f"# {words}\n" if words.isprintable() else ""


def _entry(trial: Trial, sha256: str) -> dict[str, Any]:
    return {
        "id": trial.id,
        "settings": dict(trial.settings),
        "overrides": list(trial.overrides),
        "source": str(trial.source.absolute()),
        "base_dir": str(trial.base_dir.absolute()),
        "sha256": sha256,
        "recipe": trial.recipe.model_dump(mode="json"),
    }


def _trial(entry: dict[str, Any]) -> Trial:
    recipe = Recipe.model_validate_json(json.dumps(entry["recipe"]), strict=True)
    return Trial(
        entry["id"],
        recipe,
        entry["settings"],
        tuple(entry["overrides"]),
        Path(entry["source"]),
        Path(entry["base_dir"]),
    )


def _read_entries(files: SweepFiles) -> list[dict[str, Any]]:
    try:
        content = json.loads(files.trials.read_text(encoding="utf-8"))
        version, entries = content["version"], content["trials"]
        if version == FORMAT_VERSION:
            _ = [_trial(entry) for entry in entries]
            return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"`{files.trials}` cannot be read: {type(error).__name__}"
        hint = "give the sweep another directory (`--out`)"
        raise CheckpointError(message, hint=hint) from error
    message = f"`{files.trials}` has version {version}, and this fsdpq reads {FORMAT_VERSION}"
    raise CheckpointError(message, hint="give the sweep another directory (`--out`)")


def _check_recipes(files: SweepFiles, entries: Sequence[dict[str, Any]]) -> None:
    """Raises where a frozen recipe is not what was frozen; one that is gone is written again."""
    for entry in entries:
        path = files.recipe(entry["id"])
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            trial = _trial(entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{_headline(trial)}{dump_recipe(trial.recipe)}".encode())
            continue
        if found != entry["sha256"]:
            message = f"`{path}` was changed: it is no longer the recipe of this trial"
            hint = "delete it to get it back, and put the change into the sweep"
            raise UsageError(message, hint=hint)
