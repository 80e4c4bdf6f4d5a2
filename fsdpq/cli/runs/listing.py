"""``fsdpq runs``: what there is in ``runs/``, and how it stands."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.render import clean, render_table

if TYPE_CHECKING:
    from fsdpq.launch.runs.status import RunStatus

_STATES = ("queued", "starting", "running", "finished", "failed", "saved", "stopped", "lost")
_HEADINGS = ("run", "state", "step", "loss", "held-out", "best", "size", "updated")
_LEFT_OUT_FIRST = ("size", "held-out", "loss", "updated", "best", "step")
"""Columns that a narrow terminal has no room for."""

_ORDERS: dict[str, Callable[[RunStatus], Any]] = {
    "updated": lambda run: -(run.updated or run.started or 0.0),
    "name": lambda run: str(run.root),
    "best": lambda run: math.inf if run.best_eval_loss is None else run.best_eval_loss,
    "loss": lambda run: math.inf if run.train_loss is None else run.train_loss,
    "step": lambda run: -run.step,
    "size": lambda run: -run.num_bytes,
}


@click.group("runs")
def runs_group() -> None:
    """List runs and how they stand."""


@runs_group.command("ls")
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path, file_okay=False)
)
@click.option(
    "--state", "states", multiple=True, type=click.Choice(_STATES),
    help="Only runs in this state; may be given several times.",
)  # fmt: skip
@click.option(
    "--sort", type=click.Choice(list(_ORDERS)), default="updated", show_default=True,
    help="What comes first: the newest, the best or lowest loss, the largest step or size.",
)  # fmt: skip
@json_option
def runs_ls(folder: Path | None, *, states: tuple[str, ...], sort: str, as_json: bool) -> None:
    """List the runs in DIR, by default in runs/.

    DIR may be a directory of runs, a sweep, a directory of sweeps, or one run. `best` is the lowest
    held-out loss. A run is `saved` where it was stopped and `fsdpq resume` goes on, `stopped` where
    there is no checkpoint, and `lost` where its launcher was killed.
    """
    from fsdpq.cli.screens.bar import line_width
    from fsdpq.launch.runs.listing import find_runs
    from fsdpq.launch.runs.run_dir import RUNS
    from fsdpq.launch.runs.status import read_status
    from fsdpq.launch.slurm.run_jobs import jobs_of

    runs = find_runs(folder or RUNS)
    job_of = jobs_of(runs)
    found = [read_status(files, job_of=job_of) for files in runs]
    shown = [run for run in found if not states or run.state in states]
    shown.sort(key=_ORDERS[sort])
    if as_json:
        echo_json([run.as_json() for run in shown])
        return
    if not shown:
        of = f" that are {' or '.join(states)}" if states else ""
        click.echo(f"there are no runs{of} in {folder or RUNS}", err=True)
        return
    width = line_width(sys.stdout) if sys.stdout.isatty() else None
    for line in render_runs(shown, now=time.time(), width=width):
        click.echo(line)


def render_runs(runs: Sequence[RunStatus], *, now: float, width: int | None = None) -> list[str]:
    """Returns the table of some runs.

    Args:
        runs: at least one.
        now: seconds since the epoch.
        width: characters that a line may have; columns are left out. None is any number.
    """
    from fsdpq.run_files.amounts import format_bytes

    rows = [
        (
            clean(os.path.relpath(run.root)),
            run.state,
            f"{run.step}/{run.total_steps}" if run.total_steps else "-",
            _loss(run.train_loss),
            _loss(run.eval_loss),
            _loss(run.best_eval_loss),
            format_bytes(run.num_bytes),
            format_age(run.updated or run.started, now=now),
        )
        for run in runs
    ]
    columns = dict(zip(_HEADINGS, zip(_HEADINGS, *rows, strict=True), strict=True))
    for heading in _LEFT_OUT_FIRST:
        lines = list(render_table(zip(*columns.values(), strict=True)))
        if width is None or max(map(len, lines)) <= width:
            return lines
        del columns[heading]
    return list(render_table(zip(*columns.values(), strict=True)))


def format_age(moment: float | None, *, now: float) -> str:
    """Returns how long ago a moment was: ``now``, ``5 min ago``, ``3 h ago``, ``12 d ago``."""
    if moment is None:
        return "-"
    minutes = max(0.0, now - moment) / 60
    if minutes < 1:
        return "now"
    for unit, size, limit in (("min", 1, 60), ("h", 60, 48), ("d", 60 * 24, math.inf)):
        if minutes / size < limit:
            return f"{minutes / size:.0f} {unit} ago"
    return "-"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
