"""From a file, its fragments and overrides to a checked `Recipe`, or to every Problem at once.

Values are validated strictly: ``rank: "16"`` and ``rank: 16.0`` are mistakes, because a recipe
that means something else than it says is worse than one that is refused. Validation goes through
JSON, where strictness still takes a list for a tuple and a whole number for a float.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.checks import CHECKS, NOTICES, Check
from fsdpq.recipe.compose import Override, apply_overrides, parse_overrides
from fsdpq.recipe.describe import Section, list_sections
from fsdpq.recipe.explain_errors import Translator
from fsdpq.recipe.interpolate import escape, interpolate
from fsdpq.recipe.layers import Composition, compose_layers, copy_composition
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.migrate import check_version
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.safety import check_contents, check_secrets, note_outside_paths
from fsdpq.recipe.scalars import ResolvedDumper
from fsdpq.recipe.source import Source, read_source

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
        marks: where every key and value was written: a file, or the command line.
        notices: what the user should know and is no mistake, one sentence each.
        fragments: the files that ``defaults`` named.
        paths_from: what relative paths start from, where that is not the file's own directory.
        recorded_sources: of a recipe that comes from a lock, what that says about where values were
            written (`fsdpq.recipe.provenance`); None for all others, and for older locks.
    """

    recipe: Recipe
    path: Path
    raw: bytes
    overrides: tuple[str, ...]
    marks: Marks
    notices: tuple[str, ...] = ()
    fragments: tuple[Path, ...] = ()
    paths_from: Path | None = None
    recorded_sources: Mapping[str, str] | None = None

    @property
    def base_dir(self) -> Path:
        """The directory that the recipe's relative paths start from."""
        return self.path.parent if self.paths_from is None else self.paths_from


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, base_dir: Path | None = None
) -> LoadedRecipe:
    """Returns the recipe of the file ``path`` over its fragments, with ``overrides``.

    Args:
        path: the file.
        overrides: from the command line.
        base_dir: what relative paths start from; None is the directory that the file is in.

    Raises:
        UsageError: there is no such file.
        RecipeError: with all Problems of the files and the overrides.
    """
    return load_source(read_source(path), overrides, base_dir=base_dir)


def load_source(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    without: Sequence[Check] = (),
    base_dir: Path | None = None,
) -> LoadedRecipe:
    """Returns the recipe that was read as ``source``; see `load_recipe`.

    Args:
        source: the file.
        overrides: from the command line.
        without: rules that are not asked.
        base_dir: what relative paths start from; None is the directory that the file is in.

    Raises:
        RecipeError: with all Problems of the files and the overrides.
    """
    composed = compose_source(source, base_dir=base_dir)
    parsed, mistakes = parse_overrides(overrides)
    return load_composed(composed, parsed, mistakes=mistakes, texts=overrides, without=without)


@dataclass(frozen=True)
class ComposedRecipe:
    """A recipe file over its fragments, read once for any number of `load_composed`.

    Attributes:
        source: the file.
        composition: the plain data of all layers; never changed.
        sections: of recipes.
        secrets: Problems of lines that hold a token.
        base_dir: what the recipe's relative paths start from; None is the file's directory.
    """

    source: Source
    composition: Composition
    sections: dict[str, Section]
    secrets: tuple[Problem, ...]
    base_dir: Path | None = None


def compose_source(source: Source, *, base_dir: Path | None = None) -> ComposedRecipe:
    """Returns the recipe that was read as ``source`` over its fragments, nothing validated.

    Args:
        source: the file.
        base_dir: what its relative paths start from; None is the file's directory.

    Raises:
        RecipeError: it is of another format version.
    """
    check_version(source)
    sections = list_sections()
    composition = compose_layers(source, sections)
    secrets = tuple(islice(check_secrets(composition, ()), MAX_PROBLEMS))
    return ComposedRecipe(source, composition, sections, secrets, base_dir)


def load_composed(
    composed: ComposedRecipe,
    parsed: Sequence[Override],
    *,
    mistakes: Sequence[Problem] = (),
    texts: Sequence[str] = (),
    without: Sequence[Check] = (),
) -> LoadedRecipe:
    """Returns a composed recipe with overrides; see `load_recipe`.

    Args:
        composed: the files.
        parsed: the overrides.
        mistakes: Problems of overrides that could not be parsed.
        texts: all overrides as they were given.
        without: rules that are not asked.

    Raises:
        RecipeError: with all Problems of the files and the overrides.
    """
    path, sections = composed.source.path, composed.sections
    start = path.parent if composed.base_dir is None else composed.base_dir
    composition = copy_composition(composed.composition)
    told = {problem.key for problem in composition.problems}
    composition.problems += mistakes
    apply_overrides(composition, parsed, sections)
    nothing_read = replace(composition, sources=[])
    if secrets := [*composed.secrets, *check_secrets(nothing_read, texts)][:MAX_PROBLEMS]:
        raise RecipeError(secrets)  # alone: no other message may show them
    told |= interpolate(composition, sections)
    contents = list(check_contents(composition))
    composition.problems += contents
    told |= {problem.key for problem in contents}
    translator = Translator(composition.data, composition.marks, str(path), sections)
    recipe, invalid = _validate(composition.data, translator)
    problems = composition.problems + [mistake for mistake in invalid if mistake.key not in told]
    if recipe is not None:
        checks = [check for check in CHECKS if check not in without]
        found = (problem for check in checks for problem in check(recipe, start))
        problems += [translator.locate(problem) for problem in found if problem.key not in told]
    if problems or recipe is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    notices = [*composition.notices, *note_outside_paths(recipe, composition, start)]
    notices += [notice for note in NOTICES for notice in note(recipe, start)]
    fragments = tuple(layer.path for layer in composition.sources[:-1])
    return LoadedRecipe(
        recipe, path, composed.source.raw, tuple(texts), composition.marks, tuple(notices),
        fragments, composed.base_dir,
    )  # fmt: skip


def load_resolved(path: Path) -> Recipe:
    """Returns the recipe that `dump_recipe` wrote to ``path``; this is how a worker gets it.

    Raises:
        UsageError, RecipeError: the file is missing, or was changed into something else.
    """
    source, sections = read_source(path), list_sections()
    check_version(source)
    composed = Composition(source.data, source.marks, list(source.problems))
    interpolate(composed, sections)
    translator = Translator(composed.data, composed.marks, str(path), sections)
    recipe, problems = _validate(composed.data, translator)
    problems = composed.problems + problems
    if problems or recipe is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    return recipe


def override_resolved(recipe: Recipe, overrides: Sequence[str], *, path: Path) -> LoadedRecipe:
    """Returns a resolved recipe with ``overrides``, checked.

    A run's relative paths start from a directory that may be gone, so a rule that the recipe breaks
    by itself is none that the overrides break.

    Args:
        recipe: a resolved one.
        overrides: from the command line.
        path: the file that it stands in, for messages.

    Raises:
        RecipeError: with all Problems of the overrides.
    """
    sections = list_sections()
    composed = Composition(recipe.model_dump(mode="json"), Marks(), [])
    parsed, mistakes = parse_overrides(overrides)
    apply_overrides(composed, parsed, sections)
    composed.problems += mistakes
    translator = Translator(composed.data, composed.marks, str(path), sections)
    changed, mistakes = _validate(composed.data, translator)
    problems = composed.problems + mistakes
    if changed is not None and parsed:
        known = {problem for check in CHECKS for problem in check(recipe, path.parent)}
        found = {problem: None for check in CHECKS for problem in check(changed, path.parent)}
        problems += [translator.locate(problem) for problem in found if problem not in known]
    if problems or changed is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    raw = dump_recipe(changed).encode()
    notices = tuple(composed.notices)
    return LoadedRecipe(changed, path, raw, tuple(overrides), composed.marks, notices)


def dump_recipe(recipe: Recipe) -> str:
    """Returns ``recipe`` as YAML, every default spelled out; `load_resolved` gives it back."""
    return dump_values(recipe.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """Returns the values of a resolved recipe, as ``run.lock.json`` keeps them, as its YAML."""
    data = escape(dict(values))
    return yaml.dump(data, Dumper=ResolvedDumper, sort_keys=False, allow_unicode=True, width=100)


def _validate(data: dict[str, Any], translator: Translator) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        mistakes = error.errors(include_url=False)[: 4 * MAX_PROBLEMS]
        return None, list(translator.translate(mistakes))
