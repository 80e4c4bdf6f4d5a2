"""A resolved recipe whose values know where they come from: of a recipe file, or of a run.

`fsdpq show --explain` and `fsdpq diff` read recipes through this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import Location, UsageError
from fsdpq.recipe.compose import COMMAND_LINE
from fsdpq.recipe.load import load_recipe, load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.source import KeyPath, Marks, read_source
from fsdpq.run_files.paths import RunFiles


@dataclass(frozen=True)
class View:
    """A resolved recipe and where its values were written.

    Attributes:
        path: the recipe or the run directory, as the user named it.
        file: the file that was read.
        recipe: the resolved recipe.
        marks: where every key and value was written.
        notices: what is worth knowing and no mistake.
    """

    path: Path
    file: Path
    recipe: Recipe
    marks: Marks
    notices: tuple[str, ...] = ()

    def origin(self, path: KeyPath) -> Location | None:
        """Returns where the value at ``path`` was written, None where it is a default."""
        return self.marks.values.get(path)

    def source(self, path: KeyPath) -> str:
        """Returns the source of the value at ``path`` in words."""
        place = self.origin(path)
        if place is None:
            return "default"
        if place.source == COMMAND_LINE:
            return f"command line: {place.text}"
        note = "" if place.source == str(self.file) else " (base fragment)"
        return f"{place.source}:{place.line}:{place.column}{note}"

    def values(self) -> dict[KeyPath, Any]:
        """Returns every value that is no mapping, and no list of mappings, by its path."""
        return dict(_flatten(self.recipe.model_dump(mode="json"), ()))


def open_view(path: Path, overrides: Sequence[str] = ()) -> View:
    """Returns the resolved recipe of the file or run directory ``path``.

    Raises:
        UsageError: there is no such recipe or run; overrides for a run.
        RecipeError: the recipe has mistakes.
    """
    if not path.is_dir():
        loaded = load_recipe(path, overrides)
        return View(path, path, loaded.recipe, loaded.marks, loaded.notices)
    file = RunFiles(path).resolved
    if not file.is_file():
        hint = "name a recipe file, or a directory that `fsdpq train` made"
        raise UsageError(f"`{path}` is no run directory", hint=hint)
    if overrides:
        hint = f"override the recipe that it came from, `{RunFiles(path).recipe}`"
        raise UsageError(f"the recipe of the run `{path}` is settled", hint=hint)
    return View(path, file, load_resolved(file), read_source(file).marks)


def _flatten(data: Mapping[str, Any], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in data.items():
        items = cast("list[Any]", value) if isinstance(value, list) else []
        if isinstance(value, dict):
            yield from _flatten(cast("dict[str, Any]", value), (*path, key))
        elif items and all(isinstance(item, dict) for item in items):
            for index, item in enumerate(items):
                yield from _flatten(item, (*path, key, index))
        else:
            yield (*path, key), value
