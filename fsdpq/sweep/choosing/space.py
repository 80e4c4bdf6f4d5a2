"""The trials that a sweep could have: dimensions, and the trial at one point of them.

A strategy picks points: `fsdpq.sweep.choosing.expand` all of them or some at random, Optuna one
after another. A recipe file is read once, however many trials are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from fsdpq.recipe.compose import Override
from fsdpq.recipe.describe import Section, list_sections
from fsdpq.recipe.load import ComposedRecipe, LoadedRecipe, compose_source, load_composed
from fsdpq.recipe.source import read_source
from fsdpq.sweep.choosing.grammar import Interval, Parameter, write_override
from fsdpq.sweep.choosing.parameters import override_path
from fsdpq.sweep.choosing.spec import LoadedSpec
from fsdpq.sweep.trial import Trial, trial_id

RECIPE = "recipe"
"""The key of a choice among recipe files."""


@dataclass(frozen=True)
class Dimension:
    """What is chosen at once: one key, or a group of keys that vary together.

    Attributes:
        parameters: one, or those of a zipped group.
        order: the places of the values, shuffled where that was asked for.
    """

    parameters: tuple[Parameter, ...]
    order: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its keys: ``adapter.rank`` or ``adapter.rank,adapter.alpha``."""
        return ",".join(parameter.key for parameter in self.parameters)

    @property
    def interval(self) -> Interval | None:
        """The numbers between two ends, None where the choices can be counted."""
        return self.parameters[0].interval

    @property
    def size(self) -> int | None:
        """The number of choices, None for an interval."""
        return None if self.interval else len(self.order)

    def pick(self, index: int) -> dict[str, Any]:
        """Returns the choice number ``index``, key -> value."""
        place = self.order[index]
        return {parameter.key: parameter.values[place] for parameter in self.parameters}

    def draw(self, random: Random) -> dict[str, Any]:
        """Returns one choice at random."""
        if self.interval is not None:
            return {self.name: self.interval.at(random.random())}
        return self.pick(random.randrange(len(self.order)))


@dataclass(frozen=True)
class Space:
    """All trials that a sweep could have.

    Attributes:
        loaded: the sweep.
        dimensions: what is chosen, the slowest one of a grid first.
        smoke: whether trials are only tried.
    """

    loaded: LoadedSpec
    dimensions: tuple[Dimension, ...]
    smoke: bool = False

    @property
    def size(self) -> int | None:
        """The number of combinations, None where there is an interval."""
        sizes = [dimension.size for dimension in self.dimensions]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    @cached_property
    def sections(self) -> dict[str, Section]:
        """The sections of recipes."""
        return list_sections()

    @cached_property
    def recipes(self) -> dict[str, Path]:
        """Every recipe file by the value that chooses it; the key is empty where there is one."""
        files = self.loaded.recipes
        varied = next((p for p in self.loaded.parameters if p.key == RECIPE), None)
        return dict(zip(varied.values, files, strict=True)) if varied else {"": files[0]}

    @cached_property
    def composed(self) -> dict[str, ComposedRecipe]:
        """Every recipe over its fragments, as `recipes`.

        Raises:
            UsageError: a file is missing.
            RecipeError: a file is no YAML, or of another version.
        """
        return {name: compose_source(read_source(path)) for name, path in self.recipes.items()}

    def check_files(self) -> None:
        """Reads the recipe files.

        Raises:
            UsageError, RecipeError: see `composed`.
        """
        _ = self.composed


def make_space(loaded: LoadedSpec, *, smoke: bool = False) -> Space:
    """Returns the dimensions of a sweep; a zipped group stands where its first key does.

    Args:
        loaded: the sweep.
        smoke: whether trials are only tried; the spec may say so too.
    """
    groups = {key: tuple(group) for group in loaded.spec.zip for key in group}
    known = {parameter.key: parameter for parameter in loaded.parameters}
    seed = getattr(loaded.spec.strategy, "seed", 0)
    dimensions: list[Dimension] = []
    done: set[str] = set()
    for parameter in loaded.parameters:
        if parameter.key in done:
            continue
        keys = groups.get(parameter.key, (parameter.key,))
        done.update(keys)
        order = list(range(len(parameter.values)))
        if parameter.shuffle:
            Random(f"{seed}:{parameter.key}").shuffle(order)  # noqa: S311 - no secret
        dimensions.append(Dimension(tuple(known[key] for key in keys), tuple(order)))
    return Space(loaded, tuple(dimensions), smoke or loaded.spec.smoke)


def make_trial(space: Space, choice: Mapping[str, Any]) -> Trial:
    """Returns the trial at one point of the space.

    Args:
        space: of the sweep.
        choice: key -> value, for every key that varies.

    Raises:
        RecipeError: with all Problems of the recipe that it makes.
    """
    return load_trial(space, choice)[0]


def load_trial(space: Space, choice: Mapping[str, Any]) -> tuple[Trial, LoadedRecipe]:
    """Returns the trial at one point of the space, and its recipe as it was loaded; see above."""
    name = str(choice.get(RECIPE, ""))
    composed = space.composed[name]
    changes = _overrides(space, choice)
    texts = tuple(override.text for override in (*space.loaded.fixed, *changes))
    loaded = load_composed(composed, (*space.loaded.fixed, *changes), texts=texts)
    recipe, base_dir = loaded.recipe, loaded.base_dir
    identity = trial_id(recipe, base_dir=base_dir, smoke=space.smoke)
    return Trial(identity, recipe, dict(choice), texts, composed.source.path, base_dir), loaded


def _overrides(space: Space, choice: Mapping[str, Any]) -> Sequence[Override]:
    changes: list[Override] = []
    for parameter in space.loaded.parameters:
        if parameter.key == RECIPE:
            continue
        value = choice[parameter.key]
        path = override_path(parameter.key, space.sections)
        place = parameter.location
        if parameter.places and value in parameter.values:
            place = parameter.place(parameter.values.index(value))
        text = write_override(".".join(path), value)
        changes.append(Override(path, "set", value, text, place))
    return changes
