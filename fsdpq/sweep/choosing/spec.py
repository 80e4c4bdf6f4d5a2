"""From a ``sweep.yaml`` or a command line to a checked `LoadedSpec`, or to every Problem at once.

A sweep is read like a recipe: the same bounds, the same strictness, and a place for each value.
What its trials are is decided in `fsdpq.sweep.choosing.space`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.compose import COMMAND_LINE, Override, parse_overrides
from fsdpq.recipe.describe import Section, list_sections
from fsdpq.recipe.explain_errors import Translator
from fsdpq.recipe.layers import Composition, drop_other_kind
from fsdpq.recipe.load import MAX_PROBLEMS
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.safety import check_secrets
from fsdpq.recipe.scalars import ResolvedDumper
from fsdpq.recipe.source import Source, read_source
from fsdpq.sweep.choosing.document import SPEC_VERSION, SweepSpec
from fsdpq.sweep.choosing.grammar import Parameter, on_command_line, parse_sweeps, sort_words
from fsdpq.sweep.choosing.names import find_kinds, find_recipes, move_recipes
from fsdpq.sweep.choosing.parameters import (
    check_goal,
    check_groups,
    check_keys,
    check_strategy,
    check_values,
    list_parameters,
    note_intervals,
    override_path,
)

__all__ = ["LoadedSpec", "SweepSpec", "dump_spec", "is_sweep_file", "read_spec", "recipe_spec"]

_OPTION_NAMES = {"strategy.kind": "strategy", "goal.measure": "goal"}


@dataclass(frozen=True)
class LoadedSpec:
    """A checked sweep and where it came from.

    Attributes:
        spec: the validated document.
        path: the ``sweep.yaml``, None where it was asked for on the command line.
        recipes: the recipe files, as messages show them.
        parameters: what is varied, in order; ``recipe`` is the first where there are several.
        fixed: overrides that all trials have.
        base_dir: what the spec's paths start from.
        notices: what the user should know and is no mistake, one sentence each.
    """

    spec: SweepSpec
    path: Path | None
    recipes: tuple[Path, ...]
    parameters: tuple[Parameter, ...]
    fixed: tuple[Override, ...]
    base_dir: Path
    notices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The sweep's name: its own, or its file's or recipe's."""
        if self.spec.name:
            return self.spec.name
        file = self.path if self.path is not None else self.recipes[0]
        return "sweep" if self.path is None and len(self.recipes) > 1 else file.stem

    @property
    def digest(self) -> str:
        """Eight digits that stay when values are added: recipes, keys, what all have in common."""
        keys = sorted(parameter.key for parameter in self.parameters)
        recipes = [str(path.resolve()) for path in self.recipes] if "recipe" not in keys else []
        content = [self.name, recipes, keys, list(self.spec.overrides), self.spec.smoke]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


@dataclass
class _Document:
    """A sweep on its way to a spec; ``base_dir`` is what its recipe files start from."""

    data: dict[str, Any]
    marks: Marks
    source: str
    base_dir: Path
    file: Source | None = None
    problems: list[Problem] = field(default_factory=list[Problem])


def read_spec(
    path: Path, texts: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> LoadedSpec:
    """Returns the sweep of the file ``path``, with what the command line says over it.

    Args:
        path: a ``sweep.yaml``.
        texts: overrides and sweeps from the command line: each replaces what the file has for its
            key.
        changes: other keys of the spec: ``{"strategy.kind": "random", "parallel": 2}``.

    Raises:
        UsageError: there is no such file.
        RecipeError: with all Problems.
    """
    source = read_source(path, what="sweep")
    _check_version(source.data.get("sweep"), source.marks)
    problems = list(source.problems)
    document = _Document(source.data, source.marks, str(path), path.parent, source, problems)
    return _finish(document, texts, changes or {})


def recipe_spec(
    recipe: Path, texts: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> LoadedSpec:
    """Returns the sweep over the recipe file ``recipe`` that a command line asks for.

    Args:
        recipe: its file; ``recipe=...`` among ``texts`` replaces it.
        texts: overrides and sweeps.
        changes: other keys of the spec, see `read_spec`.

    Raises:
        RecipeError: with all Problems.
    """
    data: dict[str, Any] = {"sweep": SPEC_VERSION, "recipe": str(recipe)}
    return _finish(_Document(data, Marks(), COMMAND_LINE, Path()), texts, changes or {})


def dump_spec(loaded: LoadedSpec, directory: Path) -> str:
    """Returns the sweep as a complete ``sweep.yaml`` that may lie in ``directory``."""
    values = loaded.spec.model_dump(mode="json")
    values["name"] = loaded.name
    values["recipe"] = move_recipes(loaded.spec.recipe, loaded.base_dir, directory)
    return yaml.dump(values, Dumper=ResolvedDumper, sort_keys=False, allow_unicode=True, width=100)


def is_sweep_file(path: Path) -> bool:
    """Whether the YAML file ``path`` is a sweep and not a recipe; False where it is neither."""
    try:
        return "sweep" in read_source(path).data
    except RecipeError:
        return False


def _check_version(version: Any, marks: Marks) -> None:
    if isinstance(version, int) and not isinstance(version, bool) and version > SPEC_VERSION:
        message = f"`sweep` is {version}, and this fsdpq reads sweeps of version {SPEC_VERSION}"
        place = marks.value(("sweep",))
        raise _refuse([Problem(message, "sweep", place, "install a newer fsdpq")])


def _refuse(problems: list[Problem]) -> RecipeError:
    error = RecipeError(problems[:MAX_PROBLEMS])
    error.message = error.message.replace("the recipe", "the sweep")
    return error


def _finish(document: _Document, texts: Sequence[str], changes: Mapping[str, Any]) -> LoadedSpec:
    """Validates a document with what the command line says over it."""
    _check_secrets(document, texts)
    _merge_words(document, texts)
    _merge_changes(document, changes)
    _check_strategy(document, changes)
    path = document.file.path if document.file else None
    problems, marks = document.problems, document.marks
    wrong_values = list(check_values(document.data, marks))
    if wrong_values:
        document.data["parameters"] = {}
    problems += wrong_values
    spec = _validate(document)
    if wrong_values:
        spec = None
    if spec is None:
        raise _refuse(problems)
    sections = list_sections()
    recipes, found = find_recipes(
        spec.recipe, document.base_dir, marks.value(("recipe",)), besides=path
    )
    parameters, mistakes = list_parameters(spec, marks)
    parameters, unknown = find_kinds(parameters, sections)
    if len(recipes) > 1:
        parameters = [_recipe_parameter(recipes, marks), *parameters]
    fixed, wrong = _fixed(document, spec)
    problems += [*found, *mistakes, *unknown, *wrong]
    problems += check_keys(parameters, fixed, sections)
    problems += check_groups(spec, parameters, marks)
    problems += check_strategy(spec, parameters)
    problems += check_goal(spec, marks)
    if problems:
        raise _refuse(problems)
    files = tuple(document.base_dir / name for name in recipes)
    notices = tuple(note_intervals(parameters))
    return LoadedSpec(
        spec, path, files, tuple(parameters), tuple(fixed), document.base_dir, notices
    )


def _check_secrets(document: _Document, texts: Sequence[str]) -> None:
    """Refuses a file or a command line that holds a token, before any message shows it.

    Raises:
        RecipeError: with these Problems alone.
    """
    sources = [document.file] if document.file else []
    written = Composition({}, Marks(), [], sources=sources)
    if secrets := list(islice(check_secrets(written, texts), MAX_PROBLEMS)):
        raise _refuse(secrets)


def _recipe_parameter(names: Sequence[str], marks: Marks) -> Parameter:
    return Parameter("recipe", tuple(names), location=marks.value(("recipe",)))


def _merge_words(document: _Document, texts: Sequence[str]) -> None:
    """Puts overrides and sweeps of the command line over what the document has for their keys."""
    words, sections = sort_words(texts), list_sections()
    document.problems += words.problems
    data, marks = document.data, document.marks
    parameters: dict[str, Any] | None = _entry(data, "parameters", {})
    overrides: list[Any] | None = _entry(data, "overrides", [])
    fixed = [_name_kind(text, sections) for text in words.fixed]
    named = [*words.sweeps, *(text.partition("=")[0].lstrip("+~") for text in fixed)]
    paths = {override_path(key, sections) for key in named}
    replaced = [key for key in parameters or () if override_path(key, sections) in paths]
    for key in set(replaced) - set(words.sweeps):
        del data["parameters"][key]
        _leave_groups(data, key)
    for key, text in words.sweeps.items():
        place = on_command_line(words.typed[key])
        if key == "recipe":
            _set_recipe(document, text, place)
        elif parameters is not None:
            parameters[key] = text
            _mark(marks, ("parameters", key), place)
    if overrides is not None:
        for typed, text in zip(words.fixed, fixed, strict=True):
            _mark(marks, ("overrides", len(overrides)), on_command_line(typed))
            overrides.append(text)


def _name_kind(text: str, sections: dict[str, Section]) -> str:
    """Returns ``quantization.kind=hqq`` for ``quantization=hqq``, other overrides as they are."""
    key, equals, value = text.partition("=")
    return f"{'.'.join(override_path(key, sections))}={value}" if equals else text


def _entry(data: dict[str, Any], name: str, empty: Any) -> Any:
    """Returns ``data[name]``, made where it is missing; None where it is something else."""
    value = data.setdefault(name, empty)
    return value if isinstance(value, type(empty)) else None


def _mark(marks: Marks, path: tuple[str | int, ...], place: Location) -> None:
    marks.forget(path)
    marks.keys[path] = marks.values[path] = place


def _set_recipe(document: _Document, text: str, place: Location) -> None:
    """Replaces the recipe by what was typed, relative to this directory."""
    parsed, problems = parse_sweeps([("recipe", text, place)])
    document.problems += problems
    for parameter in parsed:
        values = [str(value) for value in parameter.values]
        one = values[0] if len(values) == 1 else values
        document.data["recipe"] = one if parameter.patterns is None else text
    document.base_dir = Path()
    _mark(document.marks, ("recipe",), place)


def _leave_groups(data: dict[str, Any], key: str) -> None:
    """Takes a key that no longer varies out of its zipped group."""
    groups = data.get("zip")
    for group in cast("list[Any]", groups) if isinstance(groups, list) else []:
        if isinstance(group, list) and key in group:
            cast("list[Any]", group).remove(key)


def _merge_changes(document: _Document, changes: Mapping[str, Any]) -> None:
    """Puts options of the command line over the document; a kind takes its own keys along."""
    sections = list_sections(SweepSpec)
    for key, value in sorted(changes.items(), key=lambda item: not item[0].endswith(".kind")):
        path = tuple(key.split("."))
        option = _OPTION_NAMES.get(key, path[-1]).replace("_", "-")
        text = f"--{option}" + ("" if value is True else f" {_typed(value)}")
        target = document.data
        for part in path[:-1]:
            entry = target.get(part)
            target[part] = cast("dict[str, Any]", entry if isinstance(entry, dict) else {})
            target = target[part]
        if path[-1] == "kind":
            drop_other_kind(target, value, sections.get(path[0]))
        target[path[-1]] = value
        _mark(document.marks, path, on_command_line(text))


def _check_strategy(document: _Document, changes: Mapping[str, Any]) -> None:
    """Notes a Problem where ``--trials`` is given and nothing says how they are chosen."""
    strategy: Any = document.data.get("strategy")
    given = next((key for key in changes if key.startswith("strategy.")), None)
    if given is None or not isinstance(strategy, dict) or "kind" in strategy:
        return
    del document.data["strategy"]
    place = document.marks.value(tuple(given.split(".")))
    message = f"`{place.text if place else given}` says nothing about a grid, which tries all"
    hint = "add `--strategy random` or `--strategy optuna`"
    document.problems.append(Problem(message, given, place, hint))


def _typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        groups = cast("list[list[str]]", value)
        return " ".join(",".join(group) for group in groups)
    return str(value)


def _validate(document: _Document) -> SweepSpec | None:
    data = document.data
    try:
        return SweepSpec.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        sections = list_sections(SweepSpec)
        translator = Translator(data, document.marks, document.source, sections, SweepSpec)
        mistakes = error.errors(include_url=False)[: 4 * MAX_PROBLEMS]
        document.problems += translator.translate(mistakes)
        return None


def _fixed(document: _Document, spec: SweepSpec) -> tuple[list[Override], list[Problem]]:
    """Returns the overrides that all trials have, each with its place."""
    fixed: list[Override] = []
    problems: list[Problem] = []
    for index, text in enumerate(spec.overrides):
        place = document.marks.value(("overrides", index))
        parsed, mistakes = parse_overrides([text])
        fixed += [replace(override, written=place) for override in parsed]
        problems += [replace(mistake, location=place) for mistake in mistakes]
    return fixed, problems
