"""``section.field=value``, ``+section.field=value`` and ``~section.field``, in Hydra's grammar.

Only Hydra's parser is used (``[a,b]`` lists, quoted strings, ``null``, ``1e-4``), and it is
imported only where there is something to parse: it costs a quarter of a second. Why its
configuration store and its global state stay out is in `fsdpq.recipe.layers`. ``+`` and ``~`` mean
what they mean in Hydra; ``=`` also sets an optional key that the file leaves out, because a
recipe's keys are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from fsdpq.errors import Location, Problem
from fsdpq.recipe.describe import Section, suggest
from fsdpq.recipe.fields import find_field
from fsdpq.recipe.layers import Composition, describe_drop, drop_other_kind
from fsdpq.recipe.marks import KeyPath
from fsdpq.recipe.root import Recipe

COMMAND_LINE = "command line"
_WRITE = "write `section.field=value`"
_SWEEP = f"{_WRITE}; `fsdpq sweep` tries one value after another"
_QUOTE_HINT = "quote what is not a plain word: `'name=\"two words, (or more)\"'`"


@dataclass(frozen=True)
class Override:
    """One parsed override: where it goes, what it does there, its value, and its text.

    ``written`` is where it stands, None on the command line.
    """

    path: tuple[str, ...]
    action: Literal["set", "add", "delete"]
    value: Any
    text: str
    written: Location | None = None

    @property
    def key(self) -> str:
        """The dotted key."""
        return ".".join(self.path)

    @property
    def location(self) -> Location:
        """Where it stands; the command line with the override's text, if nothing else is said."""
        return self.written or Location(COMMAND_LINE, text=self.text, length=len(self.text))

    def problem(self, message: str, hint: str) -> Problem:
        """Returns a Problem with this override."""
        return Problem(message, self.key, self.location, hint)


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Parses ``texts``; what is no plain override becomes a Problem."""
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
    composed: Composition, overrides: Sequence[Override], sections: dict[str, Section]
) -> None:
    """Applies ``overrides`` to data and marks of ``composed``, in place.

    An override of ``section.kind`` chooses another set of options, so keys that only the old kind
    knows leave with it, and a notice says so. Kinds go first, so that the order on the command line
    does not matter.
    """
    for override in sorted(overrides, key=lambda o: o.path[1:] != ("kind",)):
        problem = (
            _delete(composed, override)
            if override.action == "delete"
            else _set(composed, override, sections)
        )
        if problem is not None:
            composed.problems.append(problem)


def _set(composed: Composition, override: Override, sections: dict[str, Section]) -> Problem | None:
    path, marks = _path_in(composed.data, override.path), composed.marks
    if override.action == "add" and (problem := _check_add(composed, override, sections)):
        composed.problems.append(problem)  # and go on, so that its value is checked too
    target: Any = composed.data
    for depth, part in enumerate(path[:-1], start=1):
        if problem := _check_item(target, path[:depth], override):
            return problem
        child = target[part] if isinstance(part, int) else target.get(part)
        if child is None:
            child = target[part] = _default_kind(str(part), sections) if depth == 1 else {}
            marks.keys[path[:depth]] = marks.values[path[:depth]] = override.location
        if not isinstance(child, dict | list):
            key = ".".join(str(part) for part in path[:depth])
            hint = _WRITE if depth == 1 else f"take the value away before: `~{key} {override.text}`"
            return override.problem(f"`{key}` holds a value, not keys", hint)
        target = cast("Any", child)
    if problem := _check_item(target, path, override):
        return problem
    if path[1:] == ("kind",):
        dropped = drop_other_kind(target, override.value, sections.get(str(path[0])))
        if dropped:
            notice = describe_drop(f"`{override.text}`", str(path[0]), dropped, marks)
            composed.notices.append(notice)
        for key in dropped:
            marks.forget((path[0], key))
    target[path[-1]] = override.value
    marks.forget(path)
    marks.keys[path] = marks.values[path] = override.location
    return None


def _check_item(target: Any, path: KeyPath, override: Override) -> Problem | None:
    """Returns a Problem where ``target`` is a list and has no such item, or a mapping's key is."""
    part, name = path[-1], ".".join(str(part) for part in path[:-1])
    if isinstance(target, dict):
        return None
    last = len(target) - 1
    if isinstance(part, int) and part <= last:
        return None
    hint = f"its items are `{name}.0` to `{name}.{last}`; add others in the recipe"
    return override.problem(f"`{name}` is a list without item `{part}`", hint)


def _default_kind(name: str, sections: dict[str, Section]) -> dict[str, Any]:
    """Returns what a section that the recipe leaves out is: its default kind."""
    info = Recipe.model_fields.get(name)
    kind = getattr(info.default, "kind", None) if info and name in sections else None
    return {"kind": kind} if kind else {}


def _check_add(
    composed: Composition, override: Override, sections: dict[str, Section]
) -> Problem | None:
    """Returns a Problem unless the key is optional and was written nowhere."""
    hint = f"leave the `+` out: `{override.text.lstrip('+')}`"
    at = composed.marks.keys.get(_path_in(composed.data, override.path))
    if at is not None:
        place = f"{at.source}:{at.line}" if at.line else at.source
        return override.problem(f"`{override.key}` is set already ({place})", hint)
    info = find_field(override.path, composed.data, sections)
    if info is not None and info.is_required():
        return override.problem(f"`{override.key}` is required, not optional", hint)
    return None


def _delete(composed: Composition, override: Override) -> Problem | None:
    target: Any = composed.data
    path = _path_in(composed.data, override.path)
    for part in path[:-1]:
        target = _child(target, part)
    if isinstance(target, list):
        hint = "copy the recipe and change its list"
        return override.problem("items of a list cannot be deleted here", hint)
    if isinstance(target, dict) and path[-1] in target:
        target = cast("dict[Any, Any]", target)
        del target[path[-1]]
        composed.marks.forget(path)
        return None
    known = list(cast("dict[str, Any]", target)) if isinstance(target, dict) else []
    guess = suggest(override.path[-1], known)
    hint = f"leave `{override.text}` out: it has its default already"
    if guess:
        hint = f"did you mean `~{'.'.join([*override.path[:-1], guess])}`?"
    return override.problem(f"`{override.key}` is not set, so it cannot be deleted", hint)


def _path_in(data: Any, parts: tuple[str, ...]) -> KeyPath:
    """Returns ``parts`` with numbers where ``data`` has lists."""
    path: list[str | int] = []
    for part in parts:
        path.append(int(part) if isinstance(data, list) and part.isdecimal() else part)
        data = _child(data, path[-1])
    return tuple(path)


def _child(target: Any, part: str | int) -> Any:
    if isinstance(target, dict):
        return cast("dict[Any, Any]", target).get(part)
    if isinstance(target, list) and isinstance(part, int):
        return next(iter(cast("list[Any]", target)[part : part + 1]), None)
    return None


def _parse_one(parser: Any, text: str) -> Override | Problem:
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    if not text.isprintable():
        shown = text.encode("unicode_escape").decode()
        message = f"`{shown}` holds characters that cannot be printed"
        return _problem(shown, message, _QUOTE_HINT)
    if "=" not in text and not text.startswith("~"):
        return _problem(text, f"`{text}` is no override: it has no `=`", _WRITE)
    try:
        parsed = parser.parse_override(text)
    except (HydraException, RecursionError):
        return _problem(text, f"`{text}` cannot be read as an override", _QUOTE_HINT)
    actions: dict[Any, Literal["set", "add", "delete"]] = {
        OverrideType.CHANGE: "set", OverrideType.ADD: "add", OverrideType.DEL: "delete",
    }  # fmt: skip
    action = actions.get(parsed.type)
    if action is None or parsed.package is not None:
        message = f"`{text}`: only `section.field=value`, `+` and `~` are accepted here"
        return _problem(text, message, "a recipe's keys are fixed: leave `++` and `@` out")
    if action == "delete" and "=" in text:
        hint = f"write `~{parsed.key_or_group}`"
        return _problem(text, f"`{text}` deletes a key, so it has no value", hint)
    path = tuple(parsed.key_or_group.split("."))
    if not all(path) or "/" in parsed.key_or_group:
        return _problem(text, f"`{parsed.key_or_group}` is no key of a recipe", _WRITE)
    if path[0] == "defaults":
        hint = "copy the recipe and change its list"
        return _problem(text, "`defaults` stands in the recipe, not on the command line", hint)
    try:
        value = None if action == "delete" else _plain(parsed._value)
        return Override(path, action, value, text)
    except _NotPlainError as error:
        key = parsed.key_or_group
        hint = f"write an override a key: `{key}.NAME=VALUE`" if error.is_mapping else _SWEEP
        return _problem(text, f"`{text}` is {error}, and one run needs one value", hint, key)


def _problem(text: str, message: str, hint: str, key: str = "") -> Problem:
    return Problem(message, key, Location(COMMAND_LINE, text=text, length=len(text)), hint)


class _NotPlainError(Exception):
    """A value that is neither a scalar nor a list of scalars; the text says what it is."""

    def __init__(self, what: str, *, is_mapping: bool) -> None:
        super().__init__(what)
        self.is_mapping = is_mapping


def _plain(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    is_mapping = isinstance(value, dict)
    raise _NotPlainError("a mapping" if is_mapping else "a sweep", is_mapping=is_mapping)
