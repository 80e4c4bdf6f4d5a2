"""A screen for the launcher that draws nothing."""

from __future__ import annotations

from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.paths import RunFiles


class Lines:
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, message: str) -> None:
        self.lines.append(message)

    def open_run(self, files: RunFiles) -> None: ...

    def show_row(self, row: Row) -> None: ...

    def close(self) -> None: ...
