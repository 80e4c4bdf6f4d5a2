"""What became of a trial, as one small JSON file that is whole or not there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole

Status = Literal["waiting", "running", "finished", "failed", "hopeless", "skipped", "interrupted"]
"""``hopeless`` was ended early because others were better; ``skipped`` does not fit by plan;
``interrupted`` goes on when the sweep does."""

SETTLED: frozenset[Status] = frozenset({"finished", "failed", "hopeless", "skipped"})
"""A sweep that is run again leaves these alone: `is_settled` says more."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        id: of the trial.
        status: see `Status`.
        reason: one line: why it failed, was skipped or ended early; else empty.
        exit_code: of its ``fsdpq train``, None where that never ended.
        started: seconds since the epoch, None where it never started.
        ended: the same for its end.
        attempts: how often it was started.
        host: machine that it ran on.
        step: where it was ended early: what it did after this step does not count; else None.
    """

    id: str
    status: Status = "waiting"
    reason: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    host: str = ""
    step: int | None = None


def is_settled(outcome: Outcome, *, retry_failed: bool, replan: bool) -> bool:
    """Returns whether a sweep that is run again leaves a trial alone.

    Args:
        outcome: of the trial.
        retry_failed: run those again that failed.
        replan: look again at those that did not fit: this may be another machine.
    """
    again: set[Status] = {"failed"} if retry_failed else set()
    again |= {"skipped"} if replan else set()
    return outcome.status in SETTLED - again


def write_outcome(files: SweepFiles, outcome: Outcome) -> None:
    """Writes what became of a trial; its folder is made where it is missing."""
    path = files.outcome(outcome.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(asdict(outcome), indent=2) + "\n").encode())


def read_outcome(files: SweepFiles, trial_id: str) -> Outcome:
    """Returns what became of a trial; ``waiting`` where nothing is known, or the file is damaged.

    Args:
        files: the sweep directory.
        trial_id: of the trial.
    """
    try:
        fields = json.loads(files.outcome(trial_id).read_text(encoding="utf-8"))
        outcome = Outcome(**fields)
    except (OSError, ValueError, TypeError):
        return Outcome(trial_id)
    return outcome if outcome.status in get_args(Status) else Outcome(trial_id)
