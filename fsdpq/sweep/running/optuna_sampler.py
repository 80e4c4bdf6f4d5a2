"""The door to Optuna: which point of a space to try next, after what the earlier ones came to.

Optuna's study lives in memory. Nothing of it is stored: a sweep that goes on asks and tells again
what it asked and told before, and the sampler, which is seeded, gives the same points again and
then the next one. https://optuna.readthedocs.io/en/stable/reference/samplers/
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.errors import MissingDependencyError

Point = tuple[int | float, ...]
"""For each dimension the index of one of its values, or a place in its interval, 0 to 1."""


@dataclass(frozen=True)
class Result:
    """What a point came to.

    Attributes:
        value: of the goal; None where it has none.
        step: where it was ended early, else None.
    """

    value: float | None
    step: int | None = None


class OptunaSampler:
    """Asks Optuna's TPE sampler for points.

    Args:
        sizes: for each dimension how many values it has; None for an interval.
        seed: the same points for the same seed and results.
        maximize: whether larger values are better.

    Raises:
        MissingDependencyError: Optuna is not installed.
    """

    def __init__(self, sizes: Sequence[int | None], *, seed: int, maximize: bool) -> None:
        self._optuna = _import_optuna()
        sampler = self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        direction = "maximize" if maximize else "minimize"
        self._study = self._optuna.create_study(sampler=sampler, direction=direction)
        self._distributions = {str(i): self._distribution(size) for i, size in enumerate(sizes)}
        self._asked: list[Any] = []

    def ask(self) -> Point:
        """Returns the next point to try. Several may be asked for before any is told."""
        trial = self._study.ask(self._distributions)
        self._asked.append(trial)
        return tuple(trial.params[name] for name in self._distributions)

    def tell(self, number: int, result: Result) -> None:
        """Tells what a point came to.

        Args:
            number: how many points were asked for before it.
            result: a trial that was ended early counts with its value at that step.
        """
        states = self._optuna.trial.TrialState
        trial = self._asked[number]
        if result.value is None or math.isnan(result.value):
            self._study.tell(trial, state=states.FAIL)
        elif result.step is not None:
            trial.report(result.value, result.step)
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, result.value)

    def _distribution(self, size: int | None) -> Any:
        kinds = self._optuna.distributions
        if size is None:
            return kinds.FloatDistribution(0.0, 1.0)
        return kinds.CategoricalDistribution(tuple(range(size)))


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingDependencyError(
            "the strategy `optuna` needs the package `optuna`",
            hint="pip install 'fsdpq[sweep]'",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
