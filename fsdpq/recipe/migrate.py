"""Rewriting a recipe of an older format version: ``fsdpq migrate``.

A migration edits the text of the recipe in place, so that comments, order and blank lines stay as
they were. `MIGRATIONS` holds one for every version that is not the newest; there is one version of
the format today, so the table is empty, and the tests put made-up versions into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.root import VERSION
from fsdpq.recipe.source import Source, read_source


class Document:
    """The text of a recipe with edits by key; ``changes`` says in words what was done."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.changes: list[str] = []

    def has(self, *path: str) -> bool:
        """Returns whether the key at ``path`` is written in the recipe."""
        return self._find(path) is not None

    def rename_key(self, *path: str, to: str) -> None:
        """Gives the key at ``path`` the name ``to``; nothing happens where it is not there."""
        if found := self._find(path):
            self._replace(found[0], to)
            self.changes.append(f"`{'.'.join(path)}` is now `{'.'.join((*path[:-1], to))}`")

    def set_value(self, *path: str, to: str) -> None:
        """Writes ``to`` for the scalar at ``path``; nothing happens where it is not there."""
        found = self._find(path)
        if found and isinstance(found[1], yaml.ScalarNode):
            old = cast("str", found[1].value)
            self._replace(found[1], to)
            self.changes.append(f"`{'.'.join(path)}: {old}` is now `{to}`")

    def delete_key(self, *path: str, why: str) -> None:
        """Deletes the lines of the key at ``path``; nothing happens where it is not there."""
        if found := self._find(path):
            lines = self.text.splitlines(keepends=True)
            first, last = found[0].start_mark.line, max(map(_last_line, found))
            self.text = "".join([*lines[:first], *lines[last + 1 :]])
            self.changes.append(f"`{'.'.join(path)}` is gone: {why}")

    def _find(self, path: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
        node: Any = cast("Any", yaml).compose(self.text, Loader=yaml.SafeLoader)
        found: tuple[yaml.Node, yaml.Node] | None = None
        for part in path:
            pairs = cast("list[Any]", node.value if isinstance(node, yaml.MappingNode) else [])
            found = next(((k, v) for k, v in pairs if k.value == part), None)
            if found is None:
                return None
            node = found[1]
        return found

    def _replace(self, node: yaml.Node, text: str) -> None:
        start, end = node.start_mark.index, node.end_mark.index
        self.text = self.text[:start] + text + self.text[end:]


def _last_line(node: yaml.Node) -> int:
    """Returns the 0-based last line of ``node``; PyYAML ends a block at what comes next."""
    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        pairs = cast("list[Any]", node.value)
        children = pairs if isinstance(node, yaml.SequenceNode) else [n for p in pairs for n in p]
        return max(map(_last_line, children))
    end = node.end_mark
    return end.line if end.column else max(node.start_mark.line, end.line - 1)


@dataclass(frozen=True)
class Migration:
    """The step from one format version to the next; ``apply`` edits the document in place."""

    from_version: int
    apply: Callable[[Document], None]


MIGRATIONS: tuple[Migration, ...] = ()
"""One step a version, oldest first."""


@dataclass(frozen=True)
class Migrated:
    """A recipe in the newest format.

    Attributes:
        text: the new text of the file.
        changes: what was done, in words; empty where the recipe was new already.
    """

    text: str
    changes: tuple[str, ...]


def check_version(source: Source) -> None:
    """Refuses a recipe of another format version before anything else is said about it.

    Raises:
        RecipeError: it needs `fsdpq migrate`, or a newer fsdpq.
    """
    version = source.data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version == VERSION:
        return  # the schema has a message for everything that is no number
    message = f"`version` is {version}, and this fsdpq reads recipes of version {VERSION}"
    hint = f"`fsdpq migrate {source.path} --write` rewrites it"
    if version > VERSION:
        hint = "install a newer fsdpq"
    elif version not in {step.from_version for step in MIGRATIONS}:
        hint = f"there never was such a version: write `version: {VERSION}`"
    raise RecipeError([Problem(message, "version", source.marks.value(("version",)), hint)])


def migrate(path: Path) -> Migrated:
    """Returns the recipe file ``path`` in the newest format version; the file stays as it is.

    Raises:
        UsageError: there is no such file.
        RecipeError: it is no YAML, its version is unknown, or has no number.
    """
    source = read_source(path)
    if source.problems:
        raise RecipeError(source.problems)
    version: Any = source.data.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        location = source.marks.value(("version",)) or Location(str(path))
        hint = f"write the version that it was made for; the newest is `version: {VERSION}`"
        raise RecipeError(
            [Problem("the recipe has no `version` number", "version", location, hint)]
        )
    document = Document(source.raw.decode("utf-8-sig"))
    steps = {step.from_version: step for step in MIGRATIONS}
    while version in steps and version < VERSION:
        steps[version].apply(document)
        version += 1
        document.set_value("version", to=str(version))
    if version != VERSION:
        check_version(source)
    return Migrated(document.text, tuple(document.changes))
