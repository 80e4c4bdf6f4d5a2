"""What a run directory has to go on from, and how that differs from what is to run now.

What counts is what the newest checkpoint was made with; the recipe and the lock beside it may have
changed since. The checkpoint's content is checked by the ranks, which read it anyway.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdpq.errors import CheckpointError, UsageError
from fsdpq.launch.inputs.prepare_key import key_differences
from fsdpq.launch.ready import Settled
from fsdpq.launch.runs.lock_file import as_list, as_mapping
from fsdpq.recipe.continuation import list_changes, read_saved_recipe
from fsdpq.recipe.difference import Difference, diff_lines
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.view import View
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.tensor_files.checkpoint_manifest import (
    SavedCheckpoint,
    list_checkpoints,
    read_checkpoint,
)

ROWS, BASE = "the rows", "the base model"
"""What may change beside the keys of a recipe."""


@dataclass(frozen=True)
class Change:
    """Something that makes the run another one.

    Attributes:
        what: a recipe key, `ROWS` or `BASE`.
        now: the new value, or a hash of it.
        text: in words.
        difference: of a recipe key.
    """

    what: str
    now: Any
    text: str
    difference: Difference | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns it as the lock keeps it."""
        return {"what": self.what, "now": self.now, "text": self.text}


@dataclass(frozen=True)
class SavedRun:
    """A run directory, and the newest checkpoint in it.

    Attributes:
        files: the run directory.
        lock: the content of its lock.
        checkpoint: directory of the newest checkpoint that can be read, None without any.
        saved: its manifest.
        finished: whether the run came to its end.
    """

    files: RunFiles
    lock: Mapping[str, Any]
    checkpoint: Path | None
    saved: SavedCheckpoint | None
    finished: bool

    def old_recipe(self) -> Recipe:
        """Returns the recipe that the checkpoint was made with, else that of the run directory.

        Raises:
            CheckpointError, RecipeError: this version of fsdpq cannot read it.
        """
        if self.saved is None:
            return load_resolved(self.files.resolved)
        return read_saved_recipe(self.saved.recipe, f"the checkpoint {self.checkpoint}")

    def settings_changes(
        self, settled: Settled, *, same_rows: bool = True, same_base: bool = True
    ) -> list[Change]:
        """Returns the recipe keys that differ from what the checkpoint was made with.

        Args:
            settled: what is to run.
            same_rows: the rows are the same, whatever the keys that name them say.
            same_base: the same for the base model.
        """
        loaded = settled.loaded
        old = View(self.files.root, self.files.resolved, self.old_recipe(), Marks({}, {}))
        new = View(loaded.path, loaded.path, settled.recipe, loaded.marks)
        found = list_changes(old, new, same_rows=same_rows, same_base=same_base)
        return [_change_of(difference) for difference in found]

    def all_changes(self, settled: Settled, inputs: Mapping[str, Any]) -> list[Change]:
        """Returns the settings that differ, and whether rows or base do.

        Args:
            settled: what is to run.
            inputs: those of the new lock.
        """
        rows = self._rows_change(inputs)
        base = self._base_change(inputs)
        # Rows that are not prepared ahead are told apart by what the recipe says about them.
        same_rows = "prepared" in inputs and rows is None
        changes = self.settings_changes(settled, same_rows=same_rows, same_base=base is None)
        return [*changes, *([rows] if rows else []), *([base] if base else [])]

    def was_forced(self, change: Change) -> bool:
        """Whether the user insisted on this change when the run last went on."""
        entries = as_list(self.lock.get("resumes"))
        known = as_list(as_mapping(entries[-1]).get("forced")) if entries else []
        wanted = (change.what, change.now)
        return any((as_mapping(e).get("what"), as_mapping(e).get("now")) == wanted for e in known)

    def _rows_change(self, inputs: Mapping[str, Any]) -> Change | None:
        old = as_mapping(self.lock.get("inputs"))
        if "prepared" not in inputs:
            before, now = (source_hashes(as_mapping(entry.get("data"))) for entry in (old, inputs))
            return None if before == now else Change(ROWS, now, "the files of rows are others")
        digest = inputs["prepared"]["digest"]
        known = as_mapping(old.get("prepared"))
        # The order of the rows is in the checkpoint's too, after a space; it is in the settings.
        saved = self.saved.data_digest.partition(" ")[0] if self.saved else known.get("digest")
        if digest == saved:
            return None
        why: list[str] = []
        if known.get("digest") != digest:
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # the lock's own content
                why = key_differences(known["key"], inputs["prepared"]["key"])
        return Change(ROWS, digest, f"the rows are others ({'; '.join(why) or 'another digest'})")

    def _base_change(self, inputs: Mapping[str, Any]) -> Change | None:
        old = as_mapping(as_mapping(self.lock.get("inputs")).get("model"))
        before = (self.saved.base if self.saved else old).get("sha256")
        now = inputs["model"]["sha256"]
        if before == now:
            return None
        return Change(BASE, now, f"the base model is another (sha256 {before} became {now})")


def open_saved_run(files: RunFiles) -> SavedRun:
    """Returns what there is to go on from in a run directory.

    Raises:
        UsageError: its lock cannot be read.
        CheckpointError: it has checkpoints, and none can be read.
    """
    try:
        lock = as_mapping(json.loads(files.lock.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        hint = "name a directory that `fsdpq train` made"
        raise UsageError(f"`{files.lock}` cannot be read: {error}", hint=hint) from None
    directory, saved = _newest(files)
    finished = _is_finished(files)
    # Killed while it wrote its report: a checkpoint of the last step lets it do that again.
    is_whole = finished and (saved is None or files.report_html.exists())
    return SavedRun(files, lock, directory, saved, is_whole)


def refusal(run: SavedRun, changes: list[Change], *, hint: str) -> UsageError:
    """Returns the error for a run that would go on as another one, with a diff of the settings."""
    settings = [change.difference for change in changes if change.difference is not None]
    others = [change.text for change in changes if change.difference is None]
    named = [f"`{difference.key}` is another" for difference in settings[:3]]
    if len(settings) > 3:
        named = [f"{len(settings)} settings are others"]
    message = f"`{run.files.root}` would go on as another run: {', '.join([*named, *others])}"
    details = ""
    if settings:
        old = run.checkpoint or run.files.resolved
        details = "\n".join([f"--- {old}", "+++ now", *diff_lines(settings)])
    return UsageError(message, hint=hint, details=details)


def _newest(files: RunFiles) -> tuple[Path | None, SavedCheckpoint | None]:
    first: CheckpointError | None = None
    for directory in list_checkpoints(files.checkpoints):
        try:
            return directory, read_checkpoint(directory)
        except CheckpointError as error:
            first = first or error
    if first is not None:
        first.hint = "no checkpoint of this run can be read: start a new run"
        raise first
    return None, None


def _is_finished(files: RunFiles) -> bool:
    """Whether the ranks came to their end since they last started."""
    ended = False
    try:
        for row in read_json_lines(files.events):
            if row.get("event") == "done":
                ended = True
            elif row.get("event") == "phase" and row.get("name") != "report":
                ended = False  # a later start
    except ValueError:
        return False
    return ended


def _change_of(difference: Difference) -> Change:
    text = f"`{difference.key}` was {difference.old.value!r} and is {difference.new.value!r}"
    shown = replace(difference, old=replace(difference.old, source=""))
    return Change(difference.key, difference.new.value, text, shown)


def source_hashes(data: Mapping[str, Any]) -> list[list[Any]]:
    """Returns the hashes of the files of every source of a lock's ``inputs.data``."""
    sources = [as_mapping(source) for source in [*as_list(data.get("train")), data.get("eval")]]
    return [
        [as_mapping(file).get("sha256") for file in as_list(source.get("files"))]
        for source in sources
    ]


def list_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the packages whose version differs between two locks: name -> old, new version."""
    before, now = as_mapping(old.get("packages")), as_mapping(new.get("packages"))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return {name: [before.get(name), now.get(name)] for name in names}
