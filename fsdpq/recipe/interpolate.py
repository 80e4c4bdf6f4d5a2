r"""``${section.field}`` inside a recipe: one value repeats another.

A reference that is the whole value keeps the other value's type; inside a longer string it becomes
text. A key that the recipe leaves out gives its default. That is all: a resolver
(``${oc.env:HOME}``, ``${now:...}``) would let a stranger's recipe read the environment, so every
one is refused. ``\${`` is a literal ``${``, with OmegaConf's rule for the backslashes before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from pydantic_core import to_jsonable_python

from fsdpq.errors import Problem
from fsdpq.recipe.describe import Section, suggest
from fsdpq.recipe.fields import find_field, find_options
from fsdpq.recipe.layers import Composition
from fsdpq.recipe.marks import KeyPath
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe

MAX_STEPS = 20
MAX_TEXT = 10_000

_OPENING = re.compile(r"(\\*)\$\{")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_ESCAPE_HINT = "for a literal `${` write `\\${`"


@dataclass(frozen=True)
class _Reference:
    key: str


class _RefusedError(Exception):
    """Message and hint of what cannot be resolved; both empty where it has been told already."""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def interpolate(composed: Composition, sections: dict[str, Section]) -> set[str]:
    """Resolves every reference in ``composed.data``, in place.

    Returns:
        The keys whose values could not be resolved; each, or what it refers to, has a Problem.
    """
    return _Interpolation(composed, sections).run()


def escape(value: Any) -> Any:
    """Returns plain data whose strings `interpolate` turns into ``value`` again."""
    if isinstance(value, str):
        return _OPENING.sub(lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, list):
        return [escape(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: escape(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


class _Interpolation:
    def __init__(self, composed: Composition, sections: dict[str, Section]) -> None:
        self._composed = composed
        self._sections = sections
        self._leaves: dict[KeyPath, str] = {}
        self._done: dict[KeyPath, Any] = {}
        self._failed: set[KeyPath] = set()
        self._stack: list[KeyPath] = []

    def run(self) -> set[str]:
        self._leaves = dict(_texts(self._composed.data, ()))
        for path in self._leaves:
            try:
                value = self._resolve(path)
            except _RefusedError:
                continue
            target: Any = self._composed.data
            for part in path[:-1]:
                target = target[part]
            target[path[-1]] = value
        return {".".join(str(part) for part in path) for path in self._failed}

    def _resolve(self, path: KeyPath) -> Any:
        """Returns the value of the text at ``path``; notes a Problem where it has none."""
        if path in self._done:
            return self._done[path]
        if path in self._failed:
            raise _RefusedError
        if path in self._stack or len(self._stack) >= MAX_STEPS:
            raise self._explain_loop(path)
        self._stack.append(path)
        try:
            self._done[path] = self._expand(self._leaves[path], in_list=isinstance(path[-1], int))
        except _RefusedError as error:
            self._failed.add(path)
            if error.message:
                key = ".".join(str(part) for part in path)
                location = self._composed.marks.value(path)
                problem = Problem(error.message, key, location, error.hint)
                self._composed.problems.append(problem)
            raise _RefusedError from None
        finally:
            self._stack.pop()
        return self._done[path]

    def _explain_loop(self, path: KeyPath) -> _RefusedError:
        keys = [".".join(str(part) for part in step) for step in [*self._stack, path]]
        hint = "write a value in one of them"
        if path in self._stack:
            loop = " -> ".join(keys[self._stack.index(path) :])
            return _RefusedError(f"this reference leads back to itself: {loop}", hint)
        return _RefusedError(f"this reference goes over more than {MAX_STEPS} others", hint)

    def _expand(self, text: str, *, in_list: bool) -> Any:
        parts = list(_parse(text))
        if len(parts) == 1 and isinstance(parts[0], _Reference):
            value = self._look_up(parts[0].key)
            if in_list and isinstance(value, list):
                message = f"`${{{parts[0].key}}}` is a list, and stands inside of a list"
                raise _RefusedError(message, "write its items out")
            return value
        expanded = "".join(
            part if isinstance(part, str) else self._text_of(part.key) for part in parts
        )
        if len(expanded) > MAX_TEXT and len(expanded) > len(text):
            message = f"this text grows to more than {MAX_TEXT} characters"
            raise _RefusedError(message, "write it out, or shorten what it refers to")
        return expanded

    def _text_of(self, key: str) -> str:
        value = self._look_up(key)
        if isinstance(value, list):
            message = f"`${{{key}}}` is a list, and stands inside of a text"
            raise _RefusedError(message, "a list can only be a whole value")
        return value if isinstance(value, str) else json.dumps(value)

    def _look_up(self, key: str) -> Any:
        path = tuple(key.split("."))
        value: Any = self._composed.data
        for part in path:
            if not isinstance(value, dict) or part not in value:
                return self._default(key, path)
            value = cast("dict[str, Any]", value)[part]
        if isinstance(value, str):
            return self._resolve(path) if path in self._leaves else value
        if isinstance(value, list):
            items = enumerate(cast("list[Any]", value))
            return [
                self._resolve((*path, i)) if (*path, i) in self._leaves else item
                for i, item in items
            ]
        if isinstance(value, dict):
            message = f"`${{{key}}}` is a section, not a value"
            raise _RefusedError(message, f"name one of its keys: `${{{key}.field}}`")
        return value

    def _default(self, key: str, path: tuple[str, ...]) -> Any:
        info = find_field(path, self._composed.data, self._sections)
        if info is not None and info.is_required():
            raise _RefusedError(f"`${{{key}}}`: `{key}` is not set", f"add `{key}` to the recipe")
        if info is None or isinstance(info.default, Options):
            raise _RefusedError(f"`${{{key}}}`: there is no key `{key}`", self._guess(path))
        return to_jsonable_python(info.default)

    def _guess(self, path: tuple[str, ...]) -> str:
        data, sections = self._composed.data, self._sections
        if len(path) == 1:  # a field without its section
            for name in sections:
                if find_field((name, path[0]), data, sections):
                    return f"did you mean `${{{name}.{path[0]}}}`?"
        options = find_options(path, data, sections)
        head, word = (path[:-1], path[-1]) if options else ((), path[0])
        guess = suggest(word, (options or Recipe).model_fields)
        if guess is None:
            return "a reference is `${section.field}`; " + _ESCAPE_HINT
        return f"did you mean `${{{'.'.join([*head, guess, *([] if options else path[1:])])}}}`?"


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yields every string that holds ``${``, with its place."""
    if isinstance(value, str):
        if "${" in value:
            yield path, value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(cast("list[Any]", value)):
            yield from _texts(item, (*path, i))


def _parse(text: str) -> Iterator[str | _Reference]:
    """Yields the pieces of ``text``: literal ones, unescaped, and references."""
    position = 0
    literal = ""
    while (match := _OPENING.search(text, position)) is not None:
        literal += text[position : match.start()] + match[1][: len(match[1]) // 2]
        if len(match[1]) % 2:
            literal += "${"
            position = match.end()
            continue
        end = text.find("}", match.end())
        content = text[match.end() : end].strip() if end >= 0 else ""
        _check_reference(content, closed=end >= 0)
        if literal:
            yield literal
        yield _Reference(content)
        literal, position = "", end + 1
    if literal or position < len(text):
        yield literal + text[position:]


def _check_reference(content: str, *, closed: bool) -> None:
    shown = content if len(content) <= 40 else content[:37] + "..."
    if not closed:
        raise _RefusedError("`${` without its `}`", _ESCAPE_HINT)
    if ":" in content:
        resolver = shown.partition(":")[0]
        message = f"`${{{shown}}}` asks for the resolver `{resolver}`, and a recipe has none: "
        message += "it reads neither the environment nor the clock nor files"
        raise _RefusedError(message, "write the value, or give it on the command line")
    if content.startswith("."):
        raise _RefusedError(
            f"`${{{shown}}}` is relative", "write the whole key: `${section.field}`"
        )
    if not _REFERENCE.fullmatch(content):
        message = f"`${{{shown}}}` is no reference"
        raise _RefusedError(message, "a reference is `${section.field}`; " + _ESCAPE_HINT)
