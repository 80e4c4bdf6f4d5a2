"""A lock file as a run to do again: its recipe, with every input pinned to what the run had.

A lock comes from a stranger as a recipe does, and is read with the same care: what it says as a
recipe goes through all checks of one, no code of a model runs without the flag, and what it says
about this machine's paths is only compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import UsageError
from fsdpq.launch.runs.lock_file import FORMAT, as_list, as_mapping
from fsdpq.recipe.checks.data import check_data_path_exists
from fsdpq.recipe.load import LoadedRecipe, dump_values, load_source
from fsdpq.recipe.source import parse_source
from fsdpq.run_files.paths import RunFiles

MAX_BYTES = 64 * 10**6
"""A lock lists every file of rows; those of 100,000 files are half of this."""


@dataclass(frozen=True)
class RecordedRun:
    """A run as its lock records it.

    Attributes:
        path: of the lock.
        lock: what is in it.
        base_dir: what relative paths of the recipe start from.
    """

    path: Path
    lock: Mapping[str, Any]
    base_dir: Path

    @property
    def beside(self) -> RunFiles:
        """The run directory that the lock may still lie in."""
        return RunFiles(self.path.parent)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The recorded inputs."""
        return cast("Mapping[str, Any]", self.lock["inputs"])

    def load(self, overrides: Sequence[str] = ()) -> LoadedRecipe:
        """Returns the recorded recipe, its models and datasets at the recorded revisions.

        Raises:
            RecipeError: it is no recipe of this version.
        """
        values, pinned = _pinned(cast("dict[str, Any]", self.lock["resolved"]), self.inputs)
        try:
            raw = dump_values(values).encode()
        except RecursionError:
            raise _no_lock(self.path, "its recipe is nested too deeply") from None
        # Messages name the file that the new run has it in; it is not there yet.
        name = RunFiles(self.base_dir).resolved
        # Rows that are gone are a change to report, not a mistake in the recipe.
        source = parse_source(name, raw)
        loaded = load_source(source, overrides, without=(check_data_path_exists,))
        if "provenance" not in self.lock:
            return loaded
        known = as_mapping(self.lock["provenance"])
        sources = {str(key): str(place) for key, place in known.items()}
        return replace(loaded, recorded_sources=sources | dict.fromkeys(pinned, self.path.name))


def open_recorded(
    target: Path, *, base_dir: Path | None = None, trust_remote_code: bool = False
) -> RecordedRun:
    """Returns the run that a lock file, or the lock of a run directory, records.

    Args:
        target: of the lock, or of the run.
        base_dir: what relative paths of the recipe start from; None is what they started from.
        trust_remote_code: whether the user lets the model's code run.

    Raises:
        UsageError: there is no such lock, it is damaged or of another version, or what it records
            cannot be done again.
    """
    path = RunFiles(target).lock if target.is_dir() else target
    lock = _read(path)
    if lock.get("smoke"):
        hint = f"try the recipe again: `fsdpq train --smoke {lock.get('recipe')}`"
        raise UsageError(f"`{path}` is of a smoke run: its rows are made up", hint=hint)
    if lock.get("trust_remote_code") and not trust_remote_code:
        hint = "give `--trust-remote-code` if you trust the model's authors too"
        raise UsageError(f"the run of `{path}` ran Python code that its model brings", hint=hint)
    return RecordedRun(path, lock, (base_dir or Path(str(lock["base_dir"]))).absolute())


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        hint = "name a `run.lock.json`, or a directory that `fsdpq train` made"
        raise UsageError(f"`{path}` cannot be read: {error.strerror}", hint=hint) from None
    if len(raw) > MAX_BYTES:
        raise _no_lock(path, f"it is larger than {MAX_BYTES // 10**6} MB")
    try:
        content: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _no_lock(path, f"it is no JSON ({error})") from None
    lock = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    made_by = f"fsdpq {lock.get('fsdpq')}"
    if "fsdpq" in lock and "format" not in lock:
        hint = f"`fsdpq train {path.with_name('recipe.resolved.yaml')}` trains the same recipe"
        raise UsageError(f"`{path}` is of {made_by}, which kept no recipe in it", hint=hint)
    if isinstance(lock.get("format"), int) and lock["format"] > FORMAT:
        message = f"`{path}` is in format {lock['format']}, of {made_by}; this fsdpq reads {FORMAT}"
        raise UsageError(message, hint="install that version of fsdpq")
    wanted = {"resolved": dict, "inputs": dict, "base_dir": str}
    lacks = [name for name, sort in wanted.items() if not isinstance(lock.get(name), sort)]
    if lacks:
        raise _no_lock(path, f"it has no `{lacks[0]}`")
    return lock


def _no_lock(path: Path, why: str) -> UsageError:
    hint = "name a `run.lock.json`, or a directory that `fsdpq train` made"
    return UsageError(f"`{path}` is no lock of a run: {why}", hint=hint)


def _pinned(
    values: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns a recipe's values with the revisions of ``inputs``, where those are commits.

    Returns:
        The values, and the keys whose revision is another one than the recipe's.
    """
    pinned: dict[str, Any] = json.loads(json.dumps(values))
    changed: list[str] = []
    data = as_mapping(inputs.get("data"))
    entries = [as_mapping(entry) for entry in [*as_list(data.get("train")), data.get("eval")]]
    revisions = {str(entry.get("key")): entry.get("revision") for entry in entries}
    revisions["model"] = as_mapping(inputs.get("model")).get("revision")
    options = as_mapping(pinned.get("data"))
    sections = {"model": pinned.get("model"), "data": options, "data.eval": options.get("eval")}
    parts = as_list(options.get("mixture"))
    sections |= {f"data.mixture.{index}": part for index, part in enumerate(parts)}
    for key, section in sections.items():
        if isinstance(revisions.get(key), str) and isinstance(section, dict):
            if as_mapping(section).get("revision") != revisions[key]:
                changed.append(f"{key}.revision")
            section["revision"] = revisions[key]
    return pinned, changed
