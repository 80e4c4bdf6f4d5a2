"""Letting Optuna choose the trials, so that an interrupted search goes on as if it had not been.

Trials are asked for in rounds of as many as run at the same time. A round is told when all of it is
settled, in the order in which it was asked for, whichever trial ended first: what is asked next
depends on the results alone. A search that goes on asks all its rounds again; what has an outcome
is told from there, and the first trial without one runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.errors import RecipeError
from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.choosing.options import OptunaOptions
from fsdpq.sweep.choosing.space import Space, make_trial
from fsdpq.sweep.outcome import SETTLED, Outcome
from fsdpq.sweep.results.measures import read_measures
from fsdpq.sweep.results.results import Goal
from fsdpq.sweep.running.optuna_sampler import OptunaSampler, Point, Result
from fsdpq.sweep.trial import Trial

RunTrials = Callable[[Sequence[Trial]], Sequence[Outcome]]
"""Freezes and runs trials; returns their outcomes, in order."""


@dataclass(frozen=True)
class Search:
    """A search by Optuna in a sweep directory.

    Attributes:
        files: the sweep directory.
        space: what may be tried.
        strategy: how many trials, and the seed.
        goal: what makes one better.
        known: trials that are frozen already.
        at_once: trials that run at the same time; a search that goes on keeps its first number.
    """

    files: SweepFiles
    space: Space
    strategy: OptunaOptions
    goal: Goal
    known: Sequence[Trial]
    at_once: int

    def run(self, run_trials: RunTrials, stop: StopSignals) -> list[Trial]:
        """Runs trials until there are as many as wanted or a signal comes; returns those it has.

        Args:
            run_trials: runs a round.
            stop: what asked for an end.

        Raises:
            MissingDependencyError: Optuna is not installed.
            RecipeError: a combination that was asked for makes no recipe.
        """
        sampler = OptunaSampler(
            [dimension.size for dimension in self.space.dimensions],
            seed=self.strategy.seed,
            maximize=self.goal.better == "higher",
        )
        at_once = self._read_at_once()
        found: dict[str, Trial] = {}
        number = 0
        while number < self.strategy.trials and not stop.received:
            size = min(at_once, self.strategy.trials - number)
            asked = [self._trial_at(sampler.ask()) for _ in range(size)]
            trials = {trial.id: trial for trial in asked if trial is not None}
            outcomes = {outcome.id: outcome for outcome in run_trials(list(trials.values()))}
            found |= trials
            if any(outcome.status not in SETTLED for outcome in outcomes.values()):
                break
            for offset, trial in enumerate(asked):
                result = Result(None) if trial is None else self._result_of(outcomes[trial.id])
                sampler.tell(number + offset, result)
            number += size
        return list(found.values())

    def _read_at_once(self) -> int:
        """Returns how many trials a round has: results do not depend on what runs at once later."""
        path = self.files.root / "search.json"
        if not path.exists():
            write_whole(path, (json.dumps({"at_once": self.at_once}) + "\n").encode())
        return int(json.loads(path.read_text(encoding="utf-8"))["at_once"])

    def _trial_at(self, point: Point) -> Trial | None:
        """Returns the trial at a point; None where it is no recipe and such are left out."""
        choice: dict[str, Any] = {}
        for dimension, place in zip(self.space.dimensions, point, strict=True):
            if dimension.interval is not None:
                choice[dimension.name] = dimension.interval.at(place)
            else:
                choice |= dimension.pick(int(place))
        for trial in self.known:
            if trial.settings == choice:
                return trial
        try:
            return make_trial(self.space, choice)
        except RecipeError:
            if self.space.loaded.spec.skip_invalid:
                return None
            raise

    def _result_of(self, outcome: Outcome) -> Result:
        if outcome.status not in ("finished", "hopeless"):
            return Result(None)
        measures = read_measures(self.files.run(outcome.id), until=outcome.step)
        return Result(measures.get(self.goal.measure), step=outcome.step)
