"""Turns pydantic's errors into Problems: one a key, in our words, at the user's line.

Everything that a message says about a key is read off the models (`fsdpq.recipe.describe`).
Pydantic puts the tag of a union into the location of an error; here it is taken out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from pydantic_core import ErrorDetails

from fsdpq.errors import Location, Problem
from fsdpq.recipe.describe import (
    Section,
    describe_field,
    describe_options,
    example_text,
    item_options,
    list_words,
    nested_options,
    show_value,
    suggest,
)
from fsdpq.recipe.marks import KeyPath, Marks, key_path
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe


class Translator:
    """Turns pydantic's errors into Problems: in our words, at the user's line."""

    def __init__(
        self,
        data: dict[str, Any],
        marks: Marks,
        source: str,
        sections: dict[str, Section],
        root: type[Options] = Recipe,
    ) -> None:
        self.root = root
        self.noun = "recipe" if root is Recipe else "sweep"
        self.data = data
        self.marks = marks
        self.source = source
        self.sections = sections

    def translate(self, errors: list[ErrorDetails]) -> Iterator[Problem]:
        """Yields one Problem a key, however many union members complained about it."""
        seen: set[KeyPath] = set()
        cleaned = [(error["type"], self._clean(error)) for error in errors]
        misspelt = {
            (*path[:-1], guess)
            for error_type, path in cleaned
            if error_type == "extra_forbidden" and (guess := self._guess(path))
        }
        inside = {path[:end] for _, path in cleaned for end in range(1, self._field_end(path))}
        for error_type, path in cleaned:
            field = path[: self._field_end(path)]
            if path in inside:  # the other members of a union, about a mapping with mistakes in it
                continue
            if field in seen or (error_type == "missing" and path in misspelt):
                continue
            if error_type != "extra_forbidden":
                seen.add(field)
            yield self._explain(error_type, path)

    def locate(self, problem: Problem) -> Problem:
        """Returns ``problem`` with the place where its key's value was written."""
        path = key_path(problem.key)
        whole_section = len(path) == 1 and path[0] in self.sections
        location = self.marks.key(path) if whole_section else self.marks.value(path)
        return replace(problem, location=location)

    def _guess(self, path: KeyPath) -> str | None:
        """Returns the key that the unknown key at ``path`` most likely means."""
        if len(path) == 1:
            return suggest(str(path[0]), self.root.model_fields)
        options = self._owner(path)
        return suggest(str(path[-1]), options.model_fields) if options else None

    def _owner(self, path: KeyPath) -> type[Options] | None:
        """Returns the class that has the field at ``path`` of a section."""
        options, _ = self._walk(path[:-1])
        return options

    def _field_end(self, path: KeyPath) -> int:
        """Returns the length of ``path`` up to its field, without the place inside of a value."""
        if len(path) < 2 or str(path[0]) not in self.sections:
            return min(len(path), 1)
        return self._walk(path)[1]

    def _walk(self, path: KeyPath) -> tuple[type[Options] | None, int]:
        """Follows ``path`` through mappings of options and lists of such mappings.

        Returns the class of the mapping at its end, None where another value is there, and how
        many parts lead to the last field or mapping that has a name.
        """
        section = self.sections[str(path[0])]
        options, items = section.options(self.data[section.name]), None
        for depth, part in enumerate(path[1:], start=1):
            if isinstance(part, int) and items is not None:
                options, items = items, None
                continue
            if options is None or isinstance(part, int):
                return None, depth
            info = options.model_fields.get(part)
            options = nested_options(info) if info else None
            items = item_options(info) if info else None
        return options, len(path)

    def _clean(self, error: ErrorDetails) -> KeyPath:
        """Returns where an error is, without the tags that pydantic adds for members of unions."""
        loc, is_missing = error["loc"], error["type"] == "missing"
        section = self.sections.get(str(loc[0])) if loc else None
        if section is not None and section.tagged and len(loc) > 1 and loc[1] in section.kinds:
            loc = (loc[0], *loc[2:])
        kept = 1 if section is None else 2  # what is no section has members of unions behind it
        if len(loc) <= kept:
            return loc
        path: KeyPath = loc[:kept]
        value: Any = self.data
        for part in path:
            value = _child(value, part)
        for index, part in enumerate(loc[kept:], kept + 1):
            if _child(value, part) is not _NOTHING or (is_missing and index == len(loc)):
                path, value = (*path, part), _child(value, part)
        return path

    def _explain(self, error_type: str, path: KeyPath) -> Problem:
        if len(path) == 0:
            return Problem(f"a {self.noun} is a mapping of sections", hint="write `section:` lines")
        name = str(path[0])
        section = self.sections.get(name)
        if error_type == "extra_forbidden":
            return self._unknown_section(path) if len(path) == 1 else self._unknown_key(path)
        if section is None:
            return self._bad_value(path) if name in self.data else self._missing(path)
        wants_kind = "" not in section.kinds
        if wants_kind and (path[1:] == ("kind",) or error_type.startswith("union_tag")):
            return self._bad_kind(section)
        if error_type == "missing":
            return self._missing(path)
        return self._not_a_mapping(name) if len(path) == 1 else self._bad_value(path)

    def _problem(
        self, message: str, path: KeyPath, location: Location | None, hint: str
    ) -> Problem:
        key = ".".join(str(part) for part in path)
        return Problem(message, key, location or Location(self.source), hint)

    def _unknown_section(self, path: KeyPath) -> Problem:
        word = str(path[0])
        guess = self._guess(path)
        hint = f"did you mean `{guess}`?" if guess else ""
        hint = hint or f"a {self.noun} has {list_words(self.root.model_fields, 'and')}"
        noun = "section" if self.root is Recipe else "key"
        return self._problem(f"unknown {noun} `{word}`", path, self.marks.key(path), hint)

    def _unknown_key(self, path: KeyPath) -> Problem:
        section, word = self.sections[str(path[0])], str(path[-1])
        options = self._owner(path)
        kind = f" (kind `{self._kind(section)}`)" if "" not in section.kinds else ""
        fields = list(options.model_fields) if options else []
        message = f"unknown key `{word}` in `{_dotted(path[:-1])}`{kind}"
        guess = self._guess(path)
        hint = f"did you mean `{guess}`?" if guess else self._home_of(word, fields, section)
        return self._problem(message, path, self.marks.key(path), hint)

    def _home_of(self, word: str, fields: list[str], section: Section) -> str:
        for kind, options in section.kinds.items():
            if word in options.model_fields:
                where = f"to kind `{kind}`" if kind else f"in `{section.name}`"
                return f"`{word}` belongs {where}"
        for other in self.sections.values():
            if any(word in options.model_fields for options in other.kinds.values()):
                return f"`{word}` belongs in `{other.name}`"
        for options in section.kinds.values():
            for name, info in options.model_fields.items():
                inner = nested_options(info) or item_options(info)
                if inner is not None and word in inner.model_fields:
                    return f"`{word}` belongs in `{section.name}.{name}`"
        return f"the keys here are {list_words(fields, 'and')}" if fields else "delete it"

    def _kind(self, section: Section) -> str:
        options = section.options(self.data[section.name])
        return next((kind for kind, known in section.kinds.items() if known is options), "")

    def _missing(self, path: KeyPath) -> Problem:
        what = str(path[-1])
        if len(path) == 1:
            noun = "section" if what in self.sections else "key"
            hint = f"add `{what}:`"
            hint += "; `recipes/quickstart.yaml` shows every section" * (self.root is Recipe)
            return self._problem(f"missing {noun} `{what}`", path, None, hint)
        options = self._owner(path)
        info = options.model_fields.get(what) if options else None
        hint = f"add `{what}:` with {describe_field(info)}" if info else f"add `{what}:`"
        message = f"missing key `{what}` in `{_dotted(path[:-1])}`"
        return self._problem(message, path, self.marks.key(path[:-1]), hint)

    def _bad_kind(self, section: Section) -> Problem:
        path: KeyPath = (section.name, "kind")
        entry: Any = self.data[section.name]
        kinds = list_words(section.kinds)
        if not isinstance(entry, dict) or "kind" not in entry:
            word = self._misspelt_kind(section)
            if word is not None:
                message, path = f"unknown key `{word}` in `{section.name}`", (section.name, word)
                return self._problem(message, path, self.marks.key(path), "did you mean `kind`?")
            message, location = f"`{section.name}` needs a `kind`", self.marks.key(path[:1])
            return self._problem(message, path, location, f"add `kind:` with {kinds}")
        word = show_value(cast("dict[str, Any]", entry)["kind"])
        guess = suggest(word, section.kinds)
        hint = f"did you mean `{guess}`?" if guess else f"`{section.name}` knows {kinds}"
        message = f"unknown kind `{word}` in `{section.name}`"
        return self._problem(message, path, self.marks.value(path), hint)

    def _misspelt_kind(self, section: Section) -> str | None:
        """Returns the key that was meant to be ``kind``, and is no other key either."""
        known = {name for options in section.kinds.values() for name in options.model_fields}
        entry: Any = self.data[section.name]
        words = list(cast("dict[str, Any]", entry)) if isinstance(entry, dict) else []
        return next((w for w in words if w not in known and suggest(w, ["kind"])), None)

    def _not_a_mapping(self, name: str) -> Problem:
        value: Any = self.data[name]
        message = f"`{name}` must be a mapping of keys, not `{show_value(value)}`"
        hint = f"write the keys of `{name}` on indented lines below it"
        if value is None:
            message = f"`{name}` is empty"
            required = self.root.model_fields[name].is_required()
            hint += "" if required else ", or delete it to take its defaults"
        return self._problem(message, (name,), self.marks.key((name,)), hint)

    def _bad_value(self, path: KeyPath) -> Problem:
        value, field_path = _value_at(self.data, path), path[: self._field_end(path)]
        in_section = str(path[0]) in self.sections
        options = self._owner(field_path) if in_section else self.root
        info = options.model_fields.get(str(field_path[-1])) if options else None
        expected = describe_field(info) if info else "something else"
        found = f", not `{show_value(value)}`"
        if in_section and isinstance(field_path[-1], int):
            item, _ = self._walk(field_path)
            expected = describe_options(item) if item else expected
        elif len(path) > len(field_path) and isinstance(path[len(field_path)], int):
            found = f"; item {int(path[len(field_path)]) + 1} is `{show_value(value)}`"
        elif len(path) > len(field_path):
            found = f"; `{path[len(field_path)]}` is `{show_value(value)}`"
        hint = _type_hint(value, expected)
        if not hint:
            examples = info.examples if info else None
            hint = f"for example `{example_text(examples[0])}`" if examples else "change it"
        message = f"`{_dotted(field_path)}` must be {expected}{found}"
        return self._problem(message, path, self.marks.value(path), hint)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


_NOTHING = object()


def _child(data: Any, part: int | str) -> Any:
    """Returns what ``data`` has at a key or an index, `_NOTHING` where it has nothing there."""
    if isinstance(data, dict):
        return cast("dict[Any, Any]", data).get(part, _NOTHING)
    if isinstance(data, list) and isinstance(part, int):
        return next(iter(cast("list[Any]", data)[part : part + 1]), _NOTHING)
    return _NOTHING


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _type_hint(value: Any, expected: str) -> str:
    if "true or false" in expected:
        word = str(value).lower()
        if word in ("on", "yes", "y", "off", "no", "n"):
            return f"write `{'true' if word in ('on', 'yes', 'y') else 'false'}`"
        if word in ("true", "false"):
            return "write it without quotes"
        return "write `true` or `false`"
    if isinstance(value, str) and "number" in expected and _is_number(value):
        return "write it without quotes"
    if isinstance(value, float) and value.is_integer() and "whole number" in expected:
        return f"write `{int(value)}`"
    guess = suggest(value, expected.split("`")[1::2]) if isinstance(value, str) else None
    return f"did you mean `{guess}`?" if guess else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
