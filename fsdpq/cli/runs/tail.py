"""``fsdpq tail``: a run as its own screen shows it, from anywhere."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from fsdpq.cli.options import RunPath, say

ALL_ROWS = "all"


def _count(_context: click.Context, _option: click.Parameter, value: str) -> int | None:
    if value == ALL_ROWS:
        return None
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f"`{value}` is neither a number nor `{ALL_ROWS}`")


@click.command("tail")
@click.argument("run", type=RunPath())
@click.option(
    "--last", "-n", metavar="N", default="20", show_default=True, callback=_count,
    help="Begin with so many rows of the past; `all` shows every one.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON lines.")
def tail_command(run: Path, *, last: int | None, as_json: bool) -> None:
    """Follow the run in the directory RUN until it ends, as its own screen does.

    A run that has ended is summed up. The exit code is that of the run: 0 finished, 75 stopped and
    saved, 130 stopped, else what it failed with. Ctrl-C ends the following, not the run.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.cli.screens.plain import PlainScreen
    from fsdpq.launch.follow import end_of, follow, open_followed
    from fsdpq.launch.slurm.run_jobs import AskedNowAndThen

    class Rows(PlainScreen):
        """Prints rows as they are."""

        def show_row(self, row: dict[str, object]) -> None:
            click.echo(json.dumps(row, ensure_ascii=False))

        def _print(self, text: str) -> None:
            del text

    files = open_followed(run)
    screen = Rows(sys.stdout) if as_json else open_screen(sys.stdout)
    try:
        screen.follow_run(files)
        status = follow(files, screen=screen, last=last, job_of=AskedNowAndThen())
    except KeyboardInterrupt:
        say(f"the run goes on without this; follow it again: fsdpq tail {shlex.quote(str(run))}")
        raise
    screen.show_summary()
    error = end_of(files, status)
    if error is not None:
        raise error
