"""Drawing a sweep while it runs. All on stderr.

On a terminal one line a trial moves; in a pipe or in CI plain lines are printed, without control
characters, and of a trial's steps one every few seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import click

from fsdpq.cli.render import clean, wants_color
from fsdpq.cli.screens.bar import in_notebook
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.amounts import format_duration
from fsdpq.sweep.outcome import Outcome
from fsdpq.sweep.trial import Trial

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STEP_INTERVAL_S = 10.0
MAX_LABEL = 48
_COLORS = {"finished": "green", "failed": "red", "interrupted": "yellow", "hopeless": "yellow"}


def open_sweep_screen(
    stream: TextIO, *, quiet: bool = False, plain: bool = False
) -> PlainSweepScreen:
    """Returns the screen for ``stream``.

    Args:
        stream: where it draws.
        quiet: draw nothing.
        plain: draw lines, also on a terminal.
    """
    if quiet:
        return QuietSweepScreen(stream)
    is_terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    if is_terminal and not plain and not os.environ.get("CI") and not in_notebook():
        return LiveSweepScreen(stream)
    return PlainSweepScreen(stream)


class PlainSweepScreen:
    """Shows a sweep as lines of text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = 0
        self._settled = 0
        self._shown: dict[str, float] = {}
        self._losses: dict[str, float] = {}

    def report(self, message: str) -> None:
        """Shows one line about the sweep."""
        self._print(clean(message))

    def expect(self, trials: Sequence[Trial], settled: int) -> None:
        """Shows that these trials are to run, of which so many have an outcome already."""
        self._total += len(trials)
        self._settled += settled
        if settled:
            self._print(f"{settled} of {len(trials)} trials have an outcome already")

    def show_start(self, trial: Trial, outcome: Outcome) -> None:
        """Shows that a trial starts."""
        again = f" (start {outcome.attempts})" if outcome.attempts > 1 else ""
        self._print(f"{trial.id} starts{again}: {clean(trial.label) or 'the recipe as it is'}")

    def show_row(self, trial: Trial, row: Row) -> None:
        """Shows one row of metrics or events of a trial, a step at most every few seconds."""
        event = row.get("event")
        if event == "eval":
            self._losses[trial.id] = row["loss"]
            self._show_evaluation(trial, row)
        elif event == "step":
            self._show_step(trial, row)

    def show_end(self, trial: Trial, outcome: Outcome) -> None:
        """Shows what became of a trial."""
        self._settled += outcome.status != "interrupted"
        status = click.style(outcome.status, fg=_COLORS.get(outcome.status))
        took = ""
        if outcome.ended is not None and outcome.started is not None:
            took = f" in {format_duration(outcome.ended - outcome.started)}"
        loss = self._losses.get(trial.id)
        told = f", held-out loss {loss:.4f}" if loss is not None else ""
        reason = f": {clean(outcome.reason)}" if outcome.reason else ""
        count = f" ({self._settled} of {self._total})" if self._total > 1 else ""
        self._print(f"{trial.id} {status}{took}{told if not reason else ''}{reason}{count}")

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def _show_evaluation(self, trial: Trial, row: Row) -> None:
        if row["step"]:
            self._print(f"{trial.id} step {row['step']}  held-out loss {row['loss']:.4f}")

    def _show_step(self, trial: Trial, row: Row) -> None:
        now = time.monotonic()
        if now - self._shown.setdefault(trial.id, now) >= STEP_INTERVAL_S:
            self._shown[trial.id] = now
            self._print(f"{trial.id} {_step_text(row)}")

    def _print(self, text: str) -> None:
        click.echo(text, file=self._stream, color=wants_color(self._stream))


class QuietSweepScreen(PlainSweepScreen):
    """Shows nothing."""

    def _print(self, text: str) -> None:
        """Drops a line."""


class LiveSweepScreen(PlainSweepScreen):
    """Shows a sweep with a moving line for each trial that runs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show_start(self, trial: Trial, outcome: Outcome) -> None:
        """Adds the line of a trial."""
        bars = self._bars or self._open_bars()
        label = clean(trial.label) or "the recipe as it is"
        label = label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 3] + "..."
        name = f"{trial.id}  {label}"
        text = "starts" if outcome.attempts == 1 else "goes on"
        self._tasks[trial.id] = bars.add_task(name, total=None, text=text)
        self._count()

    def show_end(self, trial: Trial, outcome: Outcome) -> None:
        """Takes the line of a trial away, and prints what became of it."""
        if self._bars is not None and trial.id in self._tasks:
            self._bars.remove_task(self._tasks.pop(trial.id))
        super().show_end(trial, outcome)
        self._count()

    def close(self) -> None:
        """Takes the lines off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _show_evaluation(self, trial: Trial, row: Row) -> None:
        """The newest held-out loss stands beside the step."""

    def _show_step(self, trial: Trial, row: Row) -> None:
        if self._bars is not None and trial.id in self._tasks:
            loss = self._losses.get(trial.id)
            held_out = f"  held-out {loss:.4f}" if loss is not None else ""
            self._bars.update(
                self._tasks[trial.id], completed=row["step"], total=row["total_steps"],
                text=_step_text(row) + held_out,
            )  # fmt: skip

    def _count(self) -> None:
        if self._bars is not None:
            self._bars.update(self._all, completed=self._settled, total=self._total)

    def _open_bars(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False),
        )
        console = Console(file=self._stream)
        self._bars = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._bars.start()
        self._all = self._bars.add_task("trials", total=self._total, text="")
        return self._bars

    def _print(self, text: str) -> None:
        if self._bars is None:
            super()._print(text)
        else:
            plain = text if wants_color(self._stream) else click.unstyle(text)
            from rich.text import Text

            self._bars.console.print(Text.from_ansi(plain), soft_wrap=True)


def _step_text(row: Row) -> str:
    return f"step {row['step']}/{row['total_steps']}  loss {row['loss']:.4f}"
