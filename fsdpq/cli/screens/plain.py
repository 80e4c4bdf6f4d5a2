"""A run as lines of text, without control characters: for a pipe, a file, CI."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

import click

from fsdpq.cli.render import clean, wants_color
from fsdpq.cli.run_texts import (
    checkpoint_text,
    export_text,
    one_line,
    resume_text,
    setup_lines,
    step_text,
    stopped_text,
    words_of,
)
from fsdpq.cli.screens.clocks import LineClock, LoadClock, StepClock
from fsdpq.cli.screens.summary import summary_lines
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.paths import RunFiles

STEP_INTERVAL_S = 5.0

_PHASES = {
    "data": "opening the data",
    "load": "loading the base",
    "quantize": "quantizing the base",
    "eval": "evaluating",
    "train": "training",
    "export": "exporting",
    "tasks": "asking the questions of lm-evaluation-harness",
    "report": "writing the report",
}


class PlainScreen:
    """Shows a run as lines of text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._files: RunFiles | None = None
        self._clock, self._load_clock = StepClock(), LoadClock()
        self._step_lines = LineClock(STEP_INTERVAL_S, shows_first=True)
        self._save_lines = LineClock(STEP_INTERVAL_S, shows_first=True)
        self._load_lines = LineClock(STEP_INTERVAL_S, shows_first=False)
        self._request_lines = LineClock(STEP_INTERVAL_S, shows_first=False)
        self._has_load_line = False
        self._setup: Row = {}
        self._handlers: dict[str, Callable[[Row], None]] = {
            "phase": self._show_phase,
            "load": self._show_load,
            "setup": self._show_setup,
            "step": self._show_step,
            "eval": self._show_eval,
            "sample": self._show_sample,
            "requests": self._show_requests,
            "notice": self._show_notice,
            "export": self._show_export,
            "resume": self._show_resume,
            "checkpoint": self._show_checkpoint,
            "stop": self._show_stop,
            "stopped": self._show_stopped,
        }

    @property
    def files(self) -> RunFiles | None:
        """The run that is shown, None before it has a directory."""
        return self._files

    def report(self, message: str) -> None:
        """Shows one line about the preparations."""
        self._print(message)

    def open_run(self, files: RunFiles) -> None:
        """Shows where the run goes; the ranks start now."""
        self.follow_run(files)
        self._print("starting the ranks")

    def follow_run(self, files: RunFiles) -> None:
        """Shows where the run goes that somebody else has started."""
        self._files = files
        self._print(f"run directory {files.root}")

    def show_row(self, row: Row) -> None:
        """Shows one row of metrics or events; a row of an unknown sort is left out."""
        handler = self._handlers.get(str(row.get("event")))
        if handler is not None:
            handler(row)

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def show_summary(self) -> None:
        """Shows how far the run came, what it left, and what to do next."""
        if self._files is not None:
            for line in summary_lines(self._files):
                self._print(line)

    def _print(self, text: str) -> None:
        click.echo(clean(text, keep="\n"), file=self._stream, color=wants_color(self._stream))

    def _show_phase(self, row: Row) -> None:
        name = str(row["name"])
        what = f" the {words_of(self._setup).exported}" if name == "export" else ""
        self._print(_PHASES.get(name, name) + what)

    def _show_load(self, row: Row) -> None:
        """A line every few seconds; a load that is over sooner needs none beside its phase."""
        self._load_clock.take(row)
        is_whole = row["done_bytes"] >= row["total_bytes"]
        if self._load_lines.is_due(row, always=is_whole and self._has_load_line):
            self._has_load_line = True
            self._print(f"loaded {self._load_clock.text()}")

    def _show_setup(self, row: Row) -> None:
        self._setup = row
        self._print("")
        for line in setup_lines(row):
            self._print(line)
        self._print("")

    def _show_step(self, row: Row) -> None:
        self._clock.take(row)
        if self._step_lines.is_due(row, always=row["step"] == row["total_steps"]):
            width = len(str(row["total_steps"]))
            step = f"step {row['step']:>{width}}/{row['total_steps']}"
            self._print(f"{step}  {step_text(row)}  eta {self._clock.eta(row)}")

    def _show_eval(self, row: Row) -> None:
        perplexity = f" (perplexity {row['perplexity']:.2f})"
        self._print(f"held-out loss at step {row['step']}: {row['loss']:.4f}{perplexity}")

    def _show_sample(self, row: Row) -> None:
        prompt, answer = one_line(str(row["prompt"])), one_line(str(row["answer"]))
        self._print(f"{row['when']}: {prompt} -> {answer}")

    def _show_requests(self, row: Row) -> None:
        if self._request_lines.is_due(row):
            self._print(f"answered {row['done']} questions")

    def _show_notice(self, row: Row) -> None:
        self._print(f"note: {row['message']}")

    def _show_export(self, row: Row) -> None:
        self._print(export_text(row))

    def _show_resume(self, row: Row) -> None:
        self._clock = StepClock()  # what lies between the two starts is no time of training
        self._print(resume_text(row))

    def _show_checkpoint(self, row: Row) -> None:
        """A line for the first, and then one every few seconds."""
        if self._save_lines.is_due(row):
            self._print(checkpoint_text(row))

    def _show_stop(self, row: Row) -> None:
        self._print(f"{row['signal']}: the ranks save after this step and end")

    def _show_stopped(self, row: Row) -> None:
        self._print(stopped_text(row))
