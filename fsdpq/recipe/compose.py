"""``section.field=value`` overrides from the command line, in hydra's grammar.

Only hydra's parser is used (``[a,b]`` lists, quoted strings, ``null``, ``1e-4``), and it is
imported only where there is something to parse: it costs a quarter of a second. Its configuration
store, its global state and its resolvers stay out, so an override is plain data too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from fsdpq.errors import Location, Problem
from fsdpq.recipe.describe import Section
from fsdpq.recipe.source import KeyPath, Marks

COMMAND_LINE = "command line"
_QUOTE_HINT = "quote what is not a plain word: `'name=\"two words, (or more)\"'`"


@dataclass(frozen=True)
class Override:
    """One parsed override: where it goes, its value, and its text."""

    path: tuple[str, ...]
    value: Any
    text: str

    @property
    def location(self) -> Location:
        """The command line, with the override's text."""
        return Location(COMMAND_LINE, text=self.text, length=len(self.text))


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Parses ``texts``; what is no plain ``section.field=value`` becomes a Problem."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    if not texts:
        return overrides, problems
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for text in texts:
        parsed = _parse_one(parser, text)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        else:
            overrides.append(parsed)
    return overrides, problems


def apply_overrides(
    data: dict[str, Any],
    overrides: Sequence[Override],
    *,
    marks: Marks,
    sections: dict[str, Section],
) -> list[Problem]:
    """Writes ``overrides`` into ``data`` and their places into ``marks``, both in place.

    An override of ``section.kind`` chooses another set of options, so keys that only the old kind
    knows leave with it; a key that neither kind knows stays, to be reported.

    Returns:
        A Problem for each override that has no place to go.
    """
    problems: list[Problem] = []
    for override in sorted(overrides, key=lambda o: o.path[-1] != "kind"):
        if len(override.path) == 2 and override.path[1] == "kind":
            _drop_old_kind(data, override, sections)
        target: dict[str, Any] = data
        for depth, part in enumerate(override.path[:-1], start=1):
            child = target.get(part)
            if child is None:
                child = target[part] = {}
                marks.keys[override.path[:depth]] = override.location
                marks.values[override.path[:depth]] = override.location
            if not isinstance(child, dict):
                where = ".".join(override.path[:depth])
                problems.append(_problem(override.text, f"`{where}` holds a value, not keys", ""))
                break
            target = cast("dict[str, Any]", child)
        else:
            target[override.path[-1]] = override.value
            _mark(marks, override)
    return problems


def _mark(marks: Marks, override: Override) -> None:
    path: KeyPath = override.path
    for table in (marks.keys, marks.values):
        for old in [old for old in table if old[: len(path)] == path]:
            del table[old]
        table[path] = override.location


def _drop_old_kind(data: dict[str, Any], override: Override, sections: dict[str, Section]) -> None:
    section, entry = sections.get(override.path[0]), data.get(override.path[0])
    if section is None or not isinstance(entry, dict):
        return
    entry = cast("dict[str, Any]", entry)
    old = section.options(entry)
    new = section.kinds.get(override.value) if isinstance(override.value, str) else None
    if old is not None and new is not None:
        for key in set(entry) & set(old.model_fields) - set(new.model_fields):
            del entry[key]


def _problem(text: str, message: str, hint: str, key: str = "") -> Problem:
    location = Location(COMMAND_LINE, text=text, length=len(text))
    return Problem(message, key, location, hint or "write `section.field=value`")


def _parse_one(parser: Any, text: str) -> Override | Problem:
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    if not text.isprintable():
        shown = text.encode("unicode_escape").decode()
        return _problem(shown, f"`{shown}` holds characters that cannot be printed", _QUOTE_HINT)
    if "=" not in text and not text.startswith("~"):
        return _problem(text, f"`{text}` is no override: it has no `=`", "")
    try:
        parsed = parser.parse_override(text)
    except (HydraException, RecursionError):
        return _problem(text, f"`{text}` cannot be read as an override", _QUOTE_HINT)
    if parsed.type is not OverrideType.CHANGE or parsed.package is not None:
        message = f"`{text}`: only `section.field=value` is accepted here"
        return _problem(text, message, "a recipe's keys are fixed: leave `+`, `~` and `@` out")
    path = tuple(parsed.key_or_group.split("."))
    if not all(path) or "/" in parsed.key_or_group:
        return _problem(text, f"`{parsed.key_or_group}` is no key of a recipe", "")
    try:
        return Override(path, _plain(parsed._value), text)
    except _NotPlainError as error:
        key = parsed.key_or_group
        return _problem(text, f"`{text}` is {error}, and one run needs one value", "", key)


class _NotPlainError(Exception):
    """A value that is neither a scalar nor a list of scalars; the text says what it is."""


def _plain(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _NotPlainError("a mapping" if isinstance(value, dict) else "a sweep")
