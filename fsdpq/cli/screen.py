"""Drawing a run: what is trained, how it goes, what came of it. All on stderr.

On a terminal a progress bar moves; in a pipe or in CI plain lines are printed, a step at most every
few seconds, without control characters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

import click

from fsdpq.cli.render import clean, wants_color
from fsdpq.cli.run_texts import (
    checkpoint_text,
    export_text,
    format_seconds,
    one_line,
    resume_text,
    setup_lines,
    step_text,
    stopped_text,
    summary_lines,
    words_of,
)
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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


def open_screen(stream: TextIO) -> PlainScreen:
    """Returns a live screen where ``stream`` is a terminal, else a plain one."""
    is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    if is_terminal and not os.environ.get("CI"):
        return LiveScreen(stream)
    return PlainScreen(stream)


class PlainScreen:
    """Shows a run as lines of text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._files: RunFiles | None = None
        self._clock = _StepClock()
        self._load_clock = _LoadClock()
        self._last_step_shown = 0.0
        self._last_save_shown = -STEP_INTERVAL_S
        self._last_requests_shown = time.monotonic()
        self._last_load_shown: float | None = None
        self._load_lines = 0
        self._samples: dict[str, dict[str, str]] = {}
        self._setup: Row = {}
        self._summary: Row | None = None
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
            "done": self._take_summary,
        }

    def report(self, message: str) -> None:
        """Shows one line about the preparations."""
        self._print(message)

    def open_run(self, files: RunFiles) -> None:
        """Shows where the run goes; the ranks start now."""
        self._files = files
        self._samples = _earlier_samples(files)
        self._print(f"run directory {files.root}")
        self._print("starting the ranks")

    def show_row(self, row: Row) -> None:
        """Shows one row of metrics or events; a row of an unknown sort is left out."""
        handler = self._handlers.get(str(row.get("event")))
        if handler is not None:
            handler(row)

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def show_summary(self) -> None:
        """Shows what the finished run achieved and what to do next."""
        if self._summary is None or self._files is None:
            return
        for line in summary_lines(self._summary, self._samples, self._files):
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
        now, whole = time.monotonic(), row["done_bytes"] >= row["total_bytes"]
        if self._last_load_shown is None:
            self._last_load_shown = now
        elif now - self._last_load_shown >= STEP_INTERVAL_S or (whole and self._load_lines):
            self._last_load_shown = now
            self._load_lines += 1
            self._print(f"loaded {self._load_clock.text()}")

    def _show_setup(self, row: Row) -> None:
        self._setup = row
        self._print("")
        for line in setup_lines(row):
            self._print(line)
        self._print("")

    def _show_step(self, row: Row) -> None:
        self._clock.take(row)
        now, last = time.monotonic(), row["step"] == row["total_steps"]
        if last or now - self._last_step_shown >= STEP_INTERVAL_S:
            self._last_step_shown = now
            width = len(str(row["total_steps"]))
            step = f"step {row['step']:>{width}}/{row['total_steps']}"
            self._print(f"{step}  {step_text(row)}  eta {self._clock.eta(row)}")

    def _show_eval(self, row: Row) -> None:
        perplexity = f" (perplexity {row['perplexity']:.2f})"
        self._print(f"held-out loss at step {row['step']}: {row['loss']:.4f}{perplexity}")

    def _show_sample(self, row: Row) -> None:
        prompt, when = str(row["prompt"]), str(row["when"])
        self._samples.setdefault(prompt, {})[when] = str(row["answer"])
        self._print(f"{when}: {one_line(prompt)} -> {one_line(str(row['answer']))}")

    def _show_requests(self, row: Row) -> None:
        now = time.monotonic()
        if now - self._last_requests_shown >= STEP_INTERVAL_S:
            self._last_requests_shown = now
            self._print(f"answered {row['done']} questions")

    def _show_notice(self, row: Row) -> None:
        self._print(f"note: {row['message']}")

    def _show_export(self, row: Row) -> None:
        self._print(export_text(row))

    def _show_resume(self, row: Row) -> None:
        self._clock = _StepClock()  # what lies between the two starts is no time of training
        self._print(resume_text(row))

    def _show_checkpoint(self, row: Row) -> None:
        """A line for the first, and then one every few seconds."""
        now = time.monotonic()
        if now - self._last_save_shown >= STEP_INTERVAL_S:
            self._last_save_shown = now
            self._print(checkpoint_text(row))

    def _show_stop(self, row: Row) -> None:
        self._print(f"{row['signal']}: the ranks save after this step and end")

    def _show_stopped(self, row: Row) -> None:
        self._print(stopped_text(row))

    def _take_summary(self, row: Row) -> None:
        self._summary = row


class LiveScreen(PlainScreen):
    """Shows a run with a moving bar for loading and for training."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._bar_name = ""
        self._saved = ""

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is None:
            super()._print(text)
        else:
            text = clean(text, keep="\n")
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show_phase(self, row: Row) -> None:
        if row["name"] not in ("load", "train"):
            self.close()
        super()._show_phase(row)

    def _show_load(self, row: Row) -> None:
        self._load_clock.take(row)
        self._move("load", row["done_bytes"], row["total_bytes"], self._load_clock.text())

    def _show_step(self, row: Row) -> None:
        self._clock.take(row)
        text = f"{step_text(row)}  eta {self._clock.eta(row)}{self._saved}"
        self._move("step", row["step"], row["total_steps"], text)

    def _show_checkpoint(self, row: Row) -> None:
        """The newest one stands beside the step: a line for each would scroll all else away."""
        self._saved = f"  saved {row['step']}"

    def _show_resume(self, row: Row) -> None:
        self.close()
        self._saved = f"  saved {row['step']}"
        super()._show_resume(row)

    def _move(self, name: str, done: int, total: int, text: str) -> None:
        if self._bar is None or self._bar_name != name:
            self.close()
            self._bar = self._open_bar()
            self._task = self._bar.add_task(name, total=total, text=text, count="")
            self._bar_name = name
        if self._task is not None:
            count = f"{done}/{total}" if name == "step" else ""
            self._bar.update(self._task, completed=done, total=total, text=text, count=count)

    def _open_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._stream)
        columns = (
            TextColumn("{task.description} {task.fields[count]}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
        )
        bar = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        bar.start()
        return bar


def _earlier_samples(files: RunFiles) -> dict[str, dict[str, str]]:
    """Returns what the model answered before the run went on: prompt -> when -> answer."""
    samples: dict[str, dict[str, str]] = {}
    for row in read_json_lines(files.events):
        if row.get("event") == "sample":
            samples.setdefault(str(row["prompt"]), {})[str(row["when"])] = str(row["answer"])
    return samples


class _StepClock:
    """Measures steps by the times that rank 0 wrote."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def take(self, row: Row) -> None:
        """Takes one row of a step."""
        self._last = (row["step"], row["time"])
        self._first = self._first or self._last

    def eta(self, row: Row) -> str:
        """Returns the time that the remaining steps take at the mean speed so far."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return "--:--"
        pace = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return format_seconds(pace * (row["total_steps"] - row["step"]))


class _LoadClock:
    """Measures loading by the times that rank 0 wrote; the first row is the beginning."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._done = self._total = 0
        self._time = 0.0

    def take(self, row: Row) -> None:
        """Takes one row of ``load``."""
        if row["done_bytes"] < self._done:
            self._first = None  # quantizing is over, loading begins
        self._done, self._total = row["done_bytes"], row["total_bytes"]
        self._time = row.get("time", 0.0)
        self._first = self._first or (self._done, self._time)

    def text(self) -> str:
        """Returns how much is done of how much, at what speed, and the time that is left."""
        text = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
        first_done, first_time = self._first or (0, 0.0)
        passed = self._time - first_time
        if passed <= 0 or self._done <= first_done:
            return text
        speed = (self._done - first_done) / passed
        left = format_seconds((self._total - self._done) / speed)
        return f"{text}  {format_bytes(speed)}/s  eta {left}"
