"""Every trial of a grid, or so many at random, validated before anything starts.

One mistake may be in hundreds of combinations; it is told once, with the first of them and how
many there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.load import MAX_PROBLEMS
from fsdpq.sweep.choosing.options import MAX_TRIALS, RandomOptions
from fsdpq.sweep.choosing.space import Dimension, Space, load_trial, make_space, make_trial
from fsdpq.sweep.choosing.spec import LoadedSpec
from fsdpq.sweep.trial import Trial, label_settings

__all__ = ["Dimension", "Expansion", "LeftOut", "Space", "expand", "make_space", "make_trial"]

MAX_ALIKE = 3
"""So many mistakes of one key's values are told one by one."""

_PLACE = re.compile(r" \([^()]*:[0-9]+\)")
DRAWS = 100
"""Draws for a random trial that was not drawn before; then a space counts as used up."""


@dataclass(frozen=True)
class LeftOut:
    """A combination that makes no valid recipe.

    Attributes:
        settings: what it is, key -> value.
        reason: the first Problem of the recipe.
    """

    settings: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Expansion:
    """The trials of a sweep.

    Attributes:
        trials: in order, each once.
        duplicates: how many combinations make a recipe that an earlier one makes too.
        left_out: combinations that make none (``skip_invalid``).
        notices: what the user should know and is no mistake, one sentence each.
    """

    trials: tuple[Trial, ...]
    duplicates: int = 0
    left_out: tuple[LeftOut, ...] = ()
    notices: tuple[str, ...] = ()


def expand(loaded: LoadedSpec, *, smoke: bool = False) -> Expansion:
    """Returns the trials of a sweep whose strategy is ``grid`` or ``random``.

    Args:
        loaded: the sweep.
        smoke: whether trials are only tried.

    Raises:
        UsageError: a recipe file is missing.
        RecipeError: with all Problems of all combinations; only where nothing is valid, if the
            sweep says ``skip_invalid``.
    """
    space = make_space(loaded, smoke=smoke)
    space.check_files()
    if isinstance(loaded.spec.strategy, RandomOptions):
        points = _draw(space, loaded.spec.strategy)
        return _Collected(space).collect(points, loaded.spec.strategy.trials)
    size = space.size or 0
    if size > MAX_TRIALS:
        message = f"the grid has {size} combinations, more than {MAX_TRIALS}"
        hint = "list fewer values, or draw some: `--strategy random --trials 100`"
        raise RecipeError([Problem(message, hint=hint)])
    return _Collected(space).collect(_grid(space), size)


def _grid(space: Space) -> Iterator[dict[str, Any]]:
    """Yields every combination, the last dimension fastest, as Hydra does."""
    sizes = [range(dimension.size or 0) for dimension in space.dimensions]
    for places in product(*sizes):
        picked = zip(space.dimensions, places, strict=True)
        yield {key: value for d, place in picked for key, value in d.pick(place).items()}


def _draw(space: Space, strategy: RandomOptions) -> Iterator[dict[str, Any]]:
    """Yields combinations at random, without end but where so many draws gave nothing new.

    Draw number ``i`` of a dimension depends on the seed and its keys, not on the other dimensions
    and not on how many are drawn, so a longer sweep begins like a shorter one.
    """
    seeds = [f"{strategy.seed}:{dimension.name}" for dimension in space.dimensions]
    streams = [Random(seed) for seed in seeds]  # noqa: S311 - no secret
    seen: set[str] = set()
    in_vain = 0
    while in_vain < DRAWS and (space.size is None or len(seen) < space.size):
        drawn = [d.draw(stream) for d, stream in zip(space.dimensions, streams, strict=True)]
        choice = {key: value for part in drawn for key, value in part.items()}
        known = repr(choice)
        in_vain = in_vain + 1 if known in seen else 0
        if known not in seen:
            seen.add(known)
            yield choice


def _shorten(alike: list[Problem]) -> list[Problem]:
    """Returns the first Problems of one key at one place, and how many others there are."""
    others = alike[MAX_ALIKE:]
    if len(others) < 2:
        return alike
    first = others[0]
    message = f"{len(others)} other values of `{first.key}` have mistakes too"
    return [*alike[:MAX_ALIKE], replace(first, message=message)]


class _Collected:
    """The trials of the points that were looked at so far, and what is wrong with others."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._trials: dict[str, Trial] = {}
        self._duplicates = 0
        self._left_out: list[LeftOut] = []
        self._wrong: dict[Problem, list[Mapping[str, Any]]] = {}
        self._notices: dict[str, int] = {}
        self._points: list[Mapping[str, Any]] = []

    def collect(self, points: Iterator[dict[str, Any]], wanted: int) -> Expansion:
        """Returns the trials of ``points``, at most ``wanted`` different ones."""
        skip = self._space.loaded.spec.skip_invalid
        for choice in points:
            self._add(choice)
            valid_or_wrong = len(self._trials) + (0 if skip else len(self._left_out))
            if valid_or_wrong >= wanted or len(self._left_out) >= MAX_TRIALS:
                break
        if self._wrong and not (skip and self._trials):
            raise self._refuse()
        notices = [*self._space.loaded.notices, *self._count_notices()]
        if len(self._trials) < wanted and isinstance(
            self._space.loaded.spec.strategy, RandomOptions
        ):
            notices.append(f"there are {len(self._trials)} different trials, not {wanted}")
        trials = tuple(self._trials.values())
        return Expansion(trials, self._duplicates, tuple(self._left_out), tuple(notices))

    def _add(self, choice: dict[str, Any]) -> None:
        self._points.append(choice)
        try:
            trial, loaded = load_trial(self._space, choice)
        except RecipeError as error:
            for problem in error.problems:
                self._wrong.setdefault(problem, []).append(choice)
            self._left_out.append(LeftOut(choice, error.problems[0].message))
            return
        for notice in loaded.notices:
            told = _PLACE.sub("", notice) if len(self._space.recipes) > 1 else notice
            self._notices[told] = self._notices.get(told, 0) + 1
        self._duplicates += trial.id in self._trials
        self._trials.setdefault(trial.id, trial)

    def _count_notices(self) -> Iterator[str]:
        """Yields every notice of a recipe once, with the number of trials if not all have it."""
        for notice, count in self._notices.items():
            all_have_it = count == len(self._points)
            yield notice if all_have_it else f"{notice} (in {count} of {len(self._points)})"

    def _refuse(self) -> RecipeError:
        alike: dict[tuple[str, Location | None], list[Problem]] = {}
        for problem, choices in self._wrong.items():
            told = alike.setdefault((problem.key, problem.location), [])
            told.append(self._tell(problem, choices) if len(told) < MAX_ALIKE else problem)
        problems = [problem for told in alike.values() for problem in _shorten(told)]
        error = RecipeError(problems[:MAX_PROBLEMS])
        if len(self._points) > 1:
            bad = len(self._left_out)
            error.message = f"{error.message}: {bad} of {len(self._points)} combinations cannot run"
        return error

    def _tell(self, problem: Problem, choices: list[Mapping[str, Any]]) -> Problem:
        """Returns the Problem with what the combinations that have it have in common."""
        if len(choices) == len(self._points) or not problem.key:
            return problem  # one without a key may be about a secret
        shared = {
            key: value
            for key, value in choices[0].items()
            if all(choice[key] == value for choice in choices)
            and any(point[key] != value for point in self._points)
        }
        if list(shared) == [problem.key]:
            return problem  # it is about this value, and says so
        number = sum(shared.items() <= point.items() for point in self._points)
        where = f"with `{label_settings(shared)}`"
        if number > len(choices):
            others = len(choices) - 1
            where = f"with `{label_settings(choices[0])}`"
            where += f" and {others} other combination{'s' * (others > 1)}" if others else ""
        return replace(problem, message=f"{problem.message} ({where})")
