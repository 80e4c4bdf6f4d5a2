"""From a file and overrides to a checked `Recipe`, or to every Problem at once.

Values are validated strictly: ``rank: "16"`` and ``rank: 16.0`` are mistakes, because a recipe
that means something else than it says is worse than one that is refused. Validation goes through
JSON, where strictness still takes a list for a tuple and a whole number for a float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.checks import CHECKS
from fsdpq.recipe.compose import apply_overrides, parse_overrides
from fsdpq.recipe.describe import (
    Section,
    describe_field,
    list_sections,
    list_words,
    show_value,
    suggest,
)
from fsdpq.recipe.migrate import check_version
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.source import KeyPath, Marks, ResolvedDumper, read_source

MAX_PROBLEMS = 50
"""More than this many mistakes are one: the file is no recipe."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe and where it came from.

    Attributes:
        recipe: the validated document, overrides applied.
        path: the file as the user named it.
        raw: the file's bytes.
        overrides: the overrides as given.
        marks: where every key and value was written.
    """

    recipe: Recipe
    path: Path
    raw: bytes
    overrides: tuple[str, ...]
    marks: Marks

    @property
    def base_dir(self) -> Path:
        """The directory that the recipe's relative paths start from."""
        return self.path.parent


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Returns the recipe of the file ``path`` with ``section.field=value`` overrides.

    Raises:
        UsageError: there is no such file.
        RecipeError: with all Problems of the file and the overrides.
    """
    source = read_source(path)
    check_version(source)
    sections = list_sections()
    parsed, problems = parse_overrides(overrides)
    problems += source.problems
    problems += apply_overrides(source.data, parsed, marks=source.marks, sections=sections)
    translator = _Translator(source.data, source.marks, str(path), sections)
    recipe, mistakes = _validate(source.data, translator)
    unreadable = {problem.key for problem in source.problems}
    problems += [mistake for mistake in mistakes if mistake.key not in unreadable]
    if recipe is not None:
        found = (problem for check in CHECKS for problem in check(recipe, path.parent))
        problems += [translator.locate(problem) for problem in found]
    if problems or recipe is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    return LoadedRecipe(recipe, path, source.raw, tuple(overrides), source.marks)


def load_resolved(path: Path) -> Recipe:
    """Returns the recipe that `dump_recipe` wrote to ``path``; this is how a worker gets it.

    Raises:
        UsageError, RecipeError: the file is missing, or was changed into something else.
    """
    source = read_source(path)
    check_version(source)
    translator = _Translator(source.data, source.marks, str(path), list_sections())
    recipe, problems = _validate(source.data, translator)
    problems = source.problems + problems
    if problems or recipe is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Returns ``recipe`` as YAML, every default spelled out; `load_resolved` gives it back."""
    data = recipe.model_dump(mode="json")
    return yaml.dump(data, Dumper=ResolvedDumper, sort_keys=False, allow_unicode=True, width=100)


def _validate(data: dict[str, Any], translator: _Translator) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, list(translator.translate(error.errors(include_url=False)))


class _Translator:
    """Turns pydantic's errors into Problems: in our words, at the user's line."""

    def __init__(
        self, data: dict[str, Any], marks: Marks, source: str, sections: dict[str, Section]
    ) -> None:
        self.data = data
        self.marks = marks
        self.source = source
        self.sections = sections

    def translate(self, errors: list[ErrorDetails]) -> Iterator[Problem]:
        """Yields one Problem a key, however many union members complained about it."""
        seen: set[KeyPath] = set()
        cleaned = [(error["type"], self._clean(error["loc"])) for error in errors]
        misspelt = {
            (*path[:-1], guess)
            for error_type, path in cleaned
            if error_type == "extra_forbidden" and (guess := self._guess(path))
        }
        for error_type, path in cleaned:
            if path[:2] in seen or (error_type == "missing" and path in misspelt):
                continue
            if error_type != "extra_forbidden":
                seen.add(path[:2])
            yield self._explain(error_type, path)

    def locate(self, problem: Problem) -> Problem:
        """Returns ``problem`` with the place where its key's value was written."""
        path = tuple(problem.key.split("."))
        whole_section = len(path) == 1 and path[0] in self.sections
        location = self.marks.key(path) if whole_section else self.marks.value(path)
        return replace(problem, location=location)

    def _guess(self, path: KeyPath) -> str | None:
        """Returns the key that the unknown key at ``path`` most likely means."""
        if len(path) == 1:
            return suggest(str(path[0]), Recipe.model_fields)
        section = self.sections[str(path[0])]
        options = section.options(self.data[section.name])
        return suggest(str(path[-1]), options.model_fields) if options else None

    def _clean(self, loc: tuple[int | str, ...]) -> KeyPath:
        """Returns ``loc`` without the union tags that pydantic puts into it."""
        section = self.sections.get(str(loc[0])) if loc else None
        if section is not None and section.tagged and len(loc) > 1 and loc[1] in section.kinds:
            loc = (loc[0], *loc[2:])
        if section is None or len(loc) < 3:
            return loc
        return (*loc[:2], *(part for part in loc[2:] if isinstance(part, int)))

    def _explain(self, error_type: str, path: KeyPath) -> Problem:
        if len(path) == 0:
            return Problem("a recipe is a mapping of sections", hint="write `section:` lines")
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
        hint = hint or f"a recipe has {list_words(Recipe.model_fields, 'and')}"
        return self._problem(f"unknown section `{word}`", path, self.marks.key(path), hint)

    def _unknown_key(self, path: KeyPath) -> Problem:
        section, word = self.sections[str(path[0])], str(path[-1])
        options = section.options(self.data[section.name])
        kind = f" (kind `{self._kind(section)}`)" if "" not in section.kinds else ""
        fields = list(options.model_fields) if options else []
        message = f"unknown key `{word}` in `{section.name}`{kind}"
        guess = self._guess(path)
        hint = f"did you mean `{guess}`?" if guess else self._home_of(word, fields, section)
        return self._problem(message, path, self.marks.key(path), hint)

    def _home_of(self, word: str, fields: list[str], section: Section) -> str:
        for kind, options in section.kinds.items():
            if word in options.model_fields:
                return f"`{word}` belongs to kind `{kind}`"
        for other in self.sections.values():
            if any(word in options.model_fields for options in other.kinds.values()):
                return f"`{word}` belongs in `{other.name}`"
        return f"the keys here are {list_words(fields, 'and')}" if fields else "delete it"

    def _kind(self, section: Section) -> str:
        options = section.options(self.data[section.name])
        return next((kind for kind, known in section.kinds.items() if known is options), "")

    def _missing(self, path: KeyPath) -> Problem:
        what = str(path[-1])
        if len(path) == 1:
            noun = "section" if what in self.sections else "key"
            hint = f"add `{what}:`; `recipes/quickstart.yaml` shows every section"
            return self._problem(f"missing {noun} `{what}`", path, None, hint)
        section = self.sections[str(path[0])]
        options = section.options(self.data[section.name])
        info = options.model_fields.get(what) if options else None
        hint = f"add `{what}:` with {describe_field(info)}" if info else f"add `{what}:`"
        message = f"missing key `{what}` in `{section.name}`"
        return self._problem(message, path, self.marks.key(path[:1]), hint)

    def _bad_kind(self, section: Section) -> Problem:
        path: KeyPath = (section.name, "kind")
        entry: Any = self.data[section.name]
        kinds = list_words(section.kinds)
        if not isinstance(entry, dict) or "kind" not in entry:
            message, location = f"`{section.name}` needs a `kind`", self.marks.key(path[:1])
            return self._problem(message, path, location, f"add `kind:` with {kinds}")
        word = show_value(cast("dict[str, Any]", entry)["kind"])
        guess = suggest(word, section.kinds)
        hint = f"did you mean `{guess}`?" if guess else f"`{section.name}` knows {kinds}"
        message = f"unknown kind `{word}` in `{section.name}`"
        return self._problem(message, path, self.marks.value(path), hint)

    def _not_a_mapping(self, name: str) -> Problem:
        value: Any = self.data[name]
        message = f"`{name}` must be a mapping of keys, not `{show_value(value)}`"
        hint = f"write the keys of `{name}` on indented lines below it"
        if value is None:
            message = f"`{name}` is empty"
            required = Recipe.model_fields[name].is_required()
            hint += "" if required else ", or delete it to take its defaults"
        return self._problem(message, (name,), self.marks.key((name,)), hint)

    def _bad_value(self, path: KeyPath) -> Problem:
        value, field_path = _value_at(self.data, path), path[:2]
        options = Recipe if len(path) == 1 else None
        if str(path[0]) in self.sections:
            section = self.sections[str(path[0])]
            options, field_path = section.options(self.data[section.name]), path[:2]
        info = options.model_fields.get(str(field_path[-1])) if options else None
        expected = describe_field(info) if info else "something else"
        key = ".".join(str(part) for part in field_path)
        found = f", not `{show_value(value)}`"
        if len(path) > 2:
            found = f"; item {int(path[2]) + 1} is `{show_value(value)}`"
        hint = _type_hint(value, expected)
        if not hint:
            hint = f"for example `{info.examples[0]}`" if info and info.examples else "change it"
        message = f"`{key}` must be {expected}{found}"
        return self._problem(message, path, self.marks.value(path), hint)


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _type_hint(value: Any, expected: str) -> str:
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
