"""Ending trials that others have left behind, by the median rule.

At an evaluation a trial's best held-out loss so far is compared with the median of what other
trials had at the same step; one that is worse than half of them ends. It is the median stopping
rule of Vizier (https://dl.acm.org/doi/10.1145/3097983.3098043, 3.2) with the best value in place of
a running mean, as in Optuna's ``MedianPruner``.

A trial is compared with those before it in the order of the sweep. So, one after another, the same
trials end at the same step however often the sweep was interrupted in between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import read_json_lines

Evaluations = Mapping[int, float]
"""Step -> held-out loss."""


@dataclass(frozen=True)
class Hopeless:
    """Why a trial is ended.

    Attributes:
        step: of the evaluation that decided it.
        reason: in one line, with the numbers.
    """

    step: int
    reason: str


@dataclass(frozen=True)
class MedianRule:
    """When a trial is hopeless.

    Attributes:
        min_steps: no trial ends before this step.
        min_trials: so many others must have been evaluated at the step.
    """

    min_steps: int
    min_trials: int

    def judge(
        self, own: Evaluations, others: Sequence[Evaluations], *, total_steps: int | None
    ) -> Hopeless | None:
        """Returns why a trial is hopeless, None where it is not.

        Args:
            own: of the trial.
            others: of the trials before it.
            total_steps: of the trial; at its last step there is nothing left to save.
        """
        best = math.inf
        for step in sorted(own):
            best = min(best, own[step]) if not math.isnan(own[step]) else best
            if step < self.min_steps or step == 0 or step == total_steps:
                continue
            known = [other[step] for other in others if step in other]
            if len(known) < self.min_trials or best <= (median := statistics.median(known)):
                continue
            reason = (
                f"held-out loss {best:.4f} at step {step}: "
                f"the median of {len(known)} others is {median:.4f}"
            )
            return Hopeless(step, reason)
        return None


class Curves:
    """The held-out losses of a sweep's trials: of each step the last one, as they come in.

    Args:
        files: the sweep directory.
    """

    def __init__(self, files: SweepFiles) -> None:
        self._files = files
        self._losses: dict[str, dict[int, float]] = {}
        self._total_steps: dict[str, int | None] = {}

    def of(self, trial_id: str, *, until: int | None = None) -> dict[int, float]:
        """Returns the held-out losses of a trial, step -> loss.

        Args:
            trial_id: of the trial.
            until: the last step that counts; None is all.
        """
        losses = self._read(trial_id)
        return {step: loss for step, loss in losses.items() if until is None or step <= until}

    def total_steps(self, trial_id: str) -> int | None:
        """Returns the optimizer steps that a trial has in all, None where it has not said so."""
        self._read(trial_id)
        return self._total_steps[trial_id]

    def take(self, trial_id: str, row: Row) -> bool:
        """Takes a row that a trial wrote; returns whether it is an evaluation."""
        losses, event = self._read(trial_id), row.get("event")
        if event == "setup":
            self._total_steps[trial_id] = int(row["total_steps"])
        if event == "eval":
            losses[int(row["step"])] = float(row["loss"])
        return event == "eval"

    def forget(self, trial_id: str) -> None:
        """Drops what is known of a trial that begins anew."""
        self._losses.pop(trial_id, None)

    def _read(self, trial_id: str) -> dict[int, float]:
        if trial_id not in self._losses:
            run = self._files.run(trial_id)
            self._losses[trial_id], self._total_steps[trial_id] = {}, None
            for path in (run.events, run.metrics):
                for row in read_json_lines(path):
                    self.take(trial_id, row)
        return self._losses[trial_id]
