"""Following a run that somebody else has started: ``fsdpq tail``.

Nothing of the run is touched: its rows are read as they come, and its state now and then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import FsdpqError, LaunchError, RunSavedError, RunStoppedError, UsageError
from fsdpq.launch.ranks.keeper import resume_hint
from fsdpq.launch.ranks.torchrun import POLL_S, JsonLinesTail, Row
from fsdpq.launch.runs.listing import is_run
from fsdpq.launch.runs.status import JobOf, RunStatus, read_status
from fsdpq.launch.runs.trained_run import NAME_A_RUN
from fsdpq.launch.screen import Screen
from fsdpq.run_files.paths import RunFiles

LOOK_S = 1.0
"""Time between two looks at how the run stands."""

_LEFT_OUT = ("memory", "held", "load")
"""Rows of the past that say nothing to somebody who comes later."""


def open_followed(run_dir: Path) -> RunFiles:
    """Returns the paths of a run, which may wait for its start.

    Raises:
        UsageError: there is no such run.
    """
    if not is_run(run_dir):
        raise UsageError(f"`{run_dir}` is no run directory", hint=NAME_A_RUN)
    return RunFiles(run_dir)


def follow(
    files: RunFiles, *, screen: Screen, last: int | None = None, job_of: JobOf | None = None
) -> RunStatus:
    """Shows the rows of a run until it has ended; returns how it stands then.

    Args:
        files: of the run.
        screen: shows the rows, the last of the past first.
        last: how many of the past, beside the set-up of the run; None is all.
        job_of: asks a scheduler.
    """
    status = read_status(files, job_of=job_of, with_size=False)
    tails = [JsonLinesTail(path, from_start=True) for path in (files.events, files.metrics)]
    try:
        for row in _choose(list(_read(tails)), last):
            screen.show_row(row)
        told = ""
        while status.is_active:
            if status.state == "queued" and status.where != told:
                told = status.where
                screen.report(f"waiting: {told}")
            looked = time.monotonic()
            while time.monotonic() - looked < LOOK_S:
                time.sleep(POLL_S)
                for row in _read(tails):
                    screen.show_row(row)
            status = read_status(files, job_of=job_of, with_size=False)
        for row in _read(tails):
            screen.show_row(row)
    finally:
        screen.close()
    return status


def end_of(files: RunFiles, status: RunStatus) -> FsdpqError | None:
    """Returns what the run's own launcher would have raised, None where it finished.

    Args:
        files: of the run.
        status: how it stands.
    """
    if status.state == "finished":
        return None
    way_back = resume_hint(files)
    if status.state in ("saved", "stopped"):
        message = status.error or "the run was stopped"
        if way_back and way_back not in message:
            message = f"{message}; {way_back}"
        return RunSavedError(message) if status.state == "saved" else RunStoppedError(message)
    logs = f"its logs are in `{files.logs}`"
    error = LaunchError(
        f"the run was lost: {status.error}" if status.state == "lost" else status.error,
        hint=f"{way_back}; {logs}" if way_back else logs,
    )
    if status.exit_code:
        error.exit_code = type(error.exit_code)(status.exit_code)
    return error


def _read(tails: list[JsonLinesTail]) -> Iterator[Row]:
    rows = itertools.chain.from_iterable(tail.read_new() for tail in tails)
    yield from sorted(rows, key=lambda row: row.get("time", 0.0))


def _choose(rows: list[Row], last: int | None) -> list[Row]:
    """Returns the rows of the past to show: the newest set-up, and the last of the others."""
    shown = [row for row in rows if row.get("event") not in _LEFT_OUT]
    if last is None or len(shown) <= last:
        return shown
    first = len(shown) - last
    setups = [row for row in shown[:first] if row.get("event") == "setup"]
    return [*setups[-1:], *shown[first:]]
