"""From a file and overrides to a checked `Recipe`, or to every Problem at once.

Values are validated strictly: ``rank: "16"`` and ``rank: 16.0`` are mistakes, because a recipe
that means something else than it says is worse than one that is refused. Validation goes through
JSON, where strictness still takes a list for a tuple and a whole number for a float.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.checks import CHECKS
from fsdpq.recipe.compose import apply_overrides, parse_overrides
from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.explain_errors import Translator
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.source import Marks, ResolvedDumper, read_source

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
    sections = list_sections()
    parsed, problems = parse_overrides(overrides)
    problems += source.problems
    problems += apply_overrides(source.data, parsed, marks=source.marks, sections=sections)
    translator = Translator(source.data, source.marks, str(path), sections)
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
    translator = Translator(source.data, source.marks, str(path), list_sections())
    recipe, problems = _validate(source.data, translator)
    problems = source.problems + problems
    if problems or recipe is None:
        raise RecipeError(problems[:MAX_PROBLEMS])
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Returns ``recipe`` as YAML, every default spelled out; `load_resolved` gives it back."""
    data = recipe.model_dump(mode="json")
    return yaml.dump(data, Dumper=ResolvedDumper, sort_keys=False, allow_unicode=True, width=100)


def _validate(data: dict[str, Any], translator: Translator) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, list(translator.translate(error.errors(include_url=False)))
