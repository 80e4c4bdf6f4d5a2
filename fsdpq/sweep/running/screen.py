"""What running a sweep needs of a screen; `fsdpq.cli.sweeps.screen` has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fsdpq.launch.ranks.torchrun import Row
from fsdpq.sweep.outcome import Outcome
from fsdpq.sweep.trial import Trial


class SweepScreen(Protocol):
    """What shows a sweep to the user."""

    def report(self, message: str) -> None:
        """Shows one line about the sweep."""
        ...

    def expect(self, trials: Sequence[Trial], settled: int) -> None:
        """Shows that these trials are to run, of which so many have an outcome already."""
        ...

    def show_start(self, trial: Trial, outcome: Outcome) -> None:
        """Shows that a trial starts."""
        ...

    def show_row(self, trial: Trial, row: Row) -> None:
        """Shows one row of metrics or events of a trial."""
        ...

    def show_end(self, trial: Trial, outcome: Outcome) -> None:
        """Shows what became of a trial."""
        ...

    def close(self) -> None:
        """Leaves the terminal as it was."""
        ...
