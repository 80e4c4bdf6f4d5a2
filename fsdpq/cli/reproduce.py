"""``fsdpq reproduce``: a run again, from its lock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsdpq.cli.answers import echo_json
from fsdpq.cli.options import screen_options, trust_option, warn_of_code
from fsdpq.cli.render import clean, render_table
from fsdpq.errors import ExitCode

if TYPE_CHECKING:
    from fsdpq.launch.reproduce import LossComparison
    from fsdpq.launch.runs.drift import DriftReport

_PATH = click.Path(path_type=Path)
_HEADINGS = {
    "inputs": "other inputs: this would be another run",
    "numbers": "may change the losses a little",
    "note": "changes no numbers by itself",
}
MAX_ROWS = 30
"""Rows shown of one heading."""


@click.command("reproduce")
@click.argument("target", metavar="LOCK|RUN", type=_PATH)
@click.option("--check", is_flag=True, help="Report what changed since, and run nothing.")
@click.option("--force", is_flag=True, help="Run although the data or the model is another one.")
@click.option(
    "--run-dir", type=_PATH, help="Where the run goes; default: a new directory in runs/."
)
@click.option(
    "--base-dir", type=_PATH,
    help="Where relative paths of the recipe start; default: where they started then.",
)  # fmt: skip
@trust_option
@screen_options
def reproduce_command(
    target: Path,
    *,
    check: bool,
    force: bool,
    run_dir: Path | None,
    base_dir: Path | None,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Do the run of a run.lock.json again: report what changed since, train, compare the losses.

    The recipe is the one in the lock; its own file is not needed. Exits with 1 where --check finds
    a change that may change the losses, or where the losses of the new run are not identical to
    those in the metrics.jsonl beside the lock.
    """
    from fsdpq.cli.run_result import result_fields, summed_up
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.reproduce import ReproduceOptions, reproduce

    def show(drift: DriftReport) -> None:
        if not as_json and (check or not quiet):
            for line in render_drift(drift):
                click.echo(line, err=not check)

    warn_of_code(trust_remote_code)
    screen = open_screen(sys.stderr, quiet=quiet)
    options = ReproduceOptions(check, force, run_dir, base_dir, trust_remote_code)
    with summed_up(screen, as_json=as_json):
        done = reproduce(target, options, screen=screen, on_drift=show)
    if done.files is not None:
        screen.show_summary()
        screen.report(render_losses(done.losses))
    if as_json:
        run = {} if done.files is None else {"run": result_fields(done.files)}
        echo_json(done.as_json() | run)
    elif done.files is not None:
        click.echo(done.files.root)
    drifted = done.files is None and done.drift.matters
    if drifted or (done.losses is not None and not done.losses.identical):
        sys.exit(ExitCode.RUN_FAILED)


def render_drift(drift: DriftReport) -> Iterator[str]:
    """Yields what changed as tables, and how much did not."""
    for level, heading in _HEADINGS.items():
        found = [row for row in drift.rows if row.level == level]
        if not found:
            continue
        yield heading
        rows = [("", "then", "now"), *((row.what, row.then, row.now) for row in found[:MAX_ROWS])]
        cleaned = [tuple(clean(cell) for cell in row) for row in rows]
        yield from render_table(cleaned, indent="  ")
        if len(found) > MAX_ROWS:
            yield f"  and {len(found) - MAX_ROWS} more"
        yield ""
    if drift.num_same:
        unknown = f"; {drift.num_unknown} recorded by one side only" if drift.num_unknown else ""
        yield f"{drift.num_same} things are as they were{unknown}"


def render_losses(losses: LossComparison | None) -> str:
    """Returns in one line how the losses compare."""
    if losses is None:
        return "there are no losses to compare with: `metrics.jsonl` is not beside the lock"
    missing = f"; {losses.num_missing} were logged by one run only" if losses.num_missing else ""
    if losses.largest == 0.0:
        return f"all {losses.num_compared} losses that both runs logged are identical{missing}"
    return (
        f"the largest difference of {losses.num_compared} losses is {losses.largest:.2g}, at step "
        f"{losses.step}: {losses.then:.6f} then, {losses.now:.6f} now{missing}"
    )
