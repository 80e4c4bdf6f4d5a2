"""Where the keys and values of a document were written."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsdpq.errors import Location

KeyPath = tuple[str | int, ...]
"""Where a value sits: ``("adapter", "rank")``; a number is a place in a list."""


def key_path(key: str) -> KeyPath:
    """Returns the path of a dotted key: ``data.mixture.1.path`` has the number 1."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


@dataclass
class Marks:
    """Where every key and value of a document was written.

    A value that stands there by an alias (``*name``) or a merge key (``<<``) is where its anchor
    is; a value that came from a fragment or from the command line is there.
    """

    keys: dict[KeyPath, Location] = field(default_factory=dict[KeyPath, Location])
    values: dict[KeyPath, Location] = field(default_factory=dict[KeyPath, Location])

    def key(self, path: KeyPath) -> Location | None:
        """Returns where the key at ``path`` was written, or its nearest enclosing key."""
        return _nearest(self.keys, path)

    def value(self, path: KeyPath) -> Location | None:
        """Returns where the value at ``path`` was written, or its nearest enclosing value."""
        return _nearest(self.values, path)

    def forget(self, path: KeyPath) -> None:
        """Drops the marks of ``path`` and of everything below it."""
        for table in (self.keys, self.values):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]

    def take(self, path: KeyPath, other: Marks) -> None:
        """Takes the marks of ``path`` and of everything below it from ``other``."""
        self.forget(path)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine.update({known: at for known, at in theirs.items() if known[: len(path)] == path})


def _nearest(table: dict[KeyPath, Location], path: KeyPath) -> Location | None:
    for end in range(len(path), 0, -1):
        if path[:end] in table:
            return table[path[:end]]
    return None
