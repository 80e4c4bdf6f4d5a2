"""What the launcher needs of a screen; `fsdpq.cli.screen` has one."""

from __future__ import annotations

from typing import Protocol

from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.paths import RunFiles


class Screen(Protocol):
    """What shows a run to the user."""

    def report(self, message: str) -> None:
        """Shows one line about the preparations."""
        ...

    def open_run(self, files: RunFiles) -> None:
        """Shows that the ranks are about to start."""
        ...

    def show_row(self, row: Row) -> None:
        """Shows one row of metrics or events."""
        ...

    def close(self) -> None:
        """Leaves the terminal as it was."""
        ...
