"""``fsdpq status``, ``logs`` and ``cancel``: runs that are on their way, here or as a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import RunPath, say
from fsdpq.cli.visible import encodable, visible
from fsdpq.errors import UsageError
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.sweep_paths import SweepFiles

if TYPE_CHECKING:
    from fsdpq.launch.runs.status import JobOf

_POLL_S = 0.5
_LOOK_S = 2.0
"""Time between two looks at how a run stands, while its logs are followed."""


@click.command("status")
@click.argument("runs", nargs=-1, type=RunPath(), metavar="[RUN]...")
@json_option
def status_command(runs: tuple[Path, ...], *, as_json: bool) -> None:
    """Say how the runs in the directories RUN stand, and what Slurm says about their jobs.

    Without RUN: all in runs/ that are on their way, in short.
    """
    from fsdpq.cli.runs.status_text import describe_run, list_active
    from fsdpq.launch.runs.listing import find_runs
    from fsdpq.launch.runs.status import read_status
    from fsdpq.launch.slurm.run_jobs import jobs_of

    found = [_open(path) for path in runs] if runs else find_runs()
    job_of = jobs_of(found)
    stands = [read_status(files, job_of=job_of, with_size=False) for files in found]
    if as_json:
        echo_json([status.as_json() for status in stands])
    elif runs:
        for status in stands:
            for line in describe_run(status):
                click.echo(line)
    else:
        for line in list_active(stands):
            click.echo(line)


@click.command("logs")
@click.argument("run", type=RunPath())
@click.option("--rank", type=click.IntRange(min=0), help="Only what this rank printed.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until the run ends.")
@click.option(
    "-n", "--lines", "count", type=click.IntRange(min=0), default=20, show_default=True,
    help="How many lines of each log.",
)  # fmt: skip
def logs_command(run: Path, *, rank: int | None, follow: bool, count: int) -> None:
    """Print the end of what the run in the directory RUN printed: its job, torchrun, its ranks.

    With `--follow`, Ctrl-C leaves the run alone.
    """
    from fsdpq.launch.runs.log_files import LogTail, last_lines, log_files
    from fsdpq.launch.slurm.run_jobs import AskedNowAndThen

    files, tail = _open(run), LogTail()
    found = log_files(files, rank=rank)
    printer = _Printer(files, names=rank is None)
    for path in found:
        lines, tail.positions[path] = last_lines(path, count)
        printer.show(path, lines)
    if not found and not follow:
        hint = "`fsdpq status` says how it stands"
        raise UsageError(f"`{run}` has printed nothing yet", hint=hint)
    if not follow:
        return
    job_of, looked, active, said = AskedNowAndThen(), 0.0, True, ""
    while active:
        if time.monotonic() - looked > _LOOK_S:
            looked = time.monotonic()
            active, where = _stands(files, job_of)
            if where != said and active:
                say(where)
            said = where
        for path, lines in tail.read_new(log_files(files, rank=rank)):
            printer.show(path, lines)
        time.sleep(_POLL_S if active else 0.0)


@click.command("cancel")
@click.argument("run", type=RunPath())
def cancel_command(run: Path) -> None:
    """End the run in the directory RUN, here or in Slurm: its ranks save first.

    A job that waits leaves the queue. RUN may be a sweep that was submitted: all its tasks end.
    What became of the run is printed on stdout.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.cancel import cancel_array, cancel_run

    screen = open_screen(sys.stderr)
    if SweepFiles(run).spec.is_file():
        click.echo(cancel_array(run, screen=screen))
    else:
        click.echo(cancel_run(_open(run), screen=screen))


class _Printer:
    """Prints lines of several logs; a heading says which one where that changes."""

    def __init__(self, files: RunFiles, *, names: bool) -> None:
        self._root = files.root
        self._names = names
        self._last: Path | None = None

    def show(self, path: Path, lines: Sequence[str]) -> None:
        """Prints lines of one log."""
        if self._names and lines and path != self._last:
            click.echo(("\n" if self._last else "") + f"==> {path.relative_to(self._root)} <==")
            self._last = path
        for line in lines:
            last = line.rstrip("\r").rpartition("\r")[2]  # what a progress bar left on its line
            shown = "\t".join(visible(part) for part in last.split("\t"))
            click.echo(encodable(shown, sys.stdout))


def _open(run: Path) -> RunFiles:
    from fsdpq.launch.runs.listing import is_run

    if not is_run(run):
        hint = "name a directory that `fsdpq train` made; `fsdpq runs ls` lists them"
        raise UsageError(f"`{run}` is no run directory", hint=hint)
    return RunFiles(run)


def _stands(files: RunFiles, job_of: JobOf) -> tuple[bool, str]:
    """Returns whether a run will write more, and where it is."""
    from fsdpq.launch.runs.status import read_status

    status = read_status(files, job_of=job_of, with_size=False)
    return status.is_active, f"{status.state}: {status.where}" if status.where else status.state
