"""``fsdpq sweep``: variants of a recipe, run, compared, and run again where they were cut off."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.answers import echo_json
from fsdpq.cli.options import say, screen_options, warn_of_code
from fsdpq.cli.submitting import SlurmChoice, slurm_options
from fsdpq.cli.sweeps.options import request_options, spec_options
from fsdpq.cli.sweeps.verdict import CiRequest, ci_options
from fsdpq.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from fsdpq.sweep.choosing.spec import LoadedSpec
    from fsdpq.sweep.running.request import SweepEnd, SweepRequest
    from fsdpq.sweep.running.screen import SweepScreen

MAX_WIDTH = 120
_HANDLED = ("out", "lists", "array_task")


@click.command("sweep")
@click.argument("target", metavar="RECIPE|SWEEP", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1, metavar="[SECTION.FIELD=VALUES]...")
@spec_options
@request_options
@slurm_options
@ci_options
@screen_options
def sweep_command(
    target: Path,
    *,
    words: tuple[str, ...],
    changes: Mapping[str, Any],
    wanted: Mapping[str, Any],
    slurm: SlurmChoice,
    ci: CiRequest,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train variants of RECIPE, or of SWEEP: a sweep.yaml, or the directory of a sweep.

    `adapter.rank=8,16,32 'optimizer.lr=interval(1e-5,1e-3)'` are values to try, in Hydra's grammar.
    The same command again goes on: finished trials stay, interrupted ones go on where they were.
    The directory of the sweep is printed on stdout.
    """
    from fsdpq.cli.sweeps.screen import open_sweep_screen
    from fsdpq.sweep.running.array import task_exit_code
    from fsdpq.sweep.running.flow import run_sweep
    from fsdpq.sweep.running.request import SweepRequest
    from fsdpq.sweep.running.submission import run_task, show_array

    warn_of_code(wanted["trust_remote_code"])
    loaded, out, as_frozen = read_target(target, words, changes, out=wanted["out"])
    others = {name: value for name, value in wanted.items() if name not in _HANDLED}
    request = SweepRequest(out=out, as_frozen=as_frozen, setup=slurm.setup, **others)
    screen = open_sweep_screen(sys.stderr, quiet=quiet, plain=ci.ci)
    if wanted["array_task"]:
        sys.exit(task_exit_code(run_task(loaded, request, screen=screen)))
    elif wanted["lists"]:
        show_trials(loaded, request, screen, as_json=as_json)
    elif slurm.prints:
        click.echo(show_array(loaded, request, screen=screen), nl=False)
    else:
        if loaded.spec.scheduler != "slurm":
            slurm.check_used()
        end = run_sweep(loaded, request, screen=screen)
        conclude_sweep(end, ci, quiet=quiet, as_json=as_json)


def read_target(
    target: Path, words: Sequence[str], changes: Mapping[str, Any], *, out: Path | None
) -> tuple[LoadedSpec, Path | None, bool]:
    """Returns the sweep that the command line names, its directory, and whether it is as it was.

    Args:
        target: a recipe, a ``sweep.yaml``, or the directory of a sweep.
        words: overrides and sweeps.
        changes: other keys of the spec.
        out: as the user named it.

    Raises:
        UsageError: there is no such file, or two directories are named.
        RecipeError: with all Problems of the sweep.
    """
    from fsdpq.run_files.sweep_paths import SweepFiles
    from fsdpq.sweep.choosing.spec import is_sweep_file, read_spec, recipe_spec

    if target.is_dir():
        if not (spec := SweepFiles(target).spec).is_file():
            raise UsageError(f"`{target}` is no directory of a sweep", hint="name a recipe")
        if out is not None and out.absolute() != target.absolute():
            hint = "leave `--out` out, or name the recipe"
            raise UsageError(f"`{target}` is the directory of a sweep already", hint=hint)
        as_frozen = not words and not set(changes) - {"parallel", "scheduler"}
        return read_spec(spec, words, changes), target, as_frozen
    if is_sweep_file(target):
        return read_spec(target, words, changes), out, False
    return recipe_spec(target, words, changes), out, False


def conclude_sweep(end: SweepEnd, ci: CiRequest, *, quiet: bool, as_json: bool) -> None:
    """Writes the results, shows them, and exits with the code of the sweep or of its verdict."""
    from fsdpq.cli.sweeps.conclusion import conclude
    from fsdpq.cli.sweeps.leaderboard import render_leaderboard
    from fsdpq.sweep.results.collect import collect_results, write_results

    results = collect_results(end.files)
    write_results(end.files, results)
    if not quiet:
        width = min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
        for line in ("", *render_leaderboard(results, width=width), ""):
            say(click.unstyle(line) if ci.ci else line)
        for line in _what_next(end):
            say(line)
    verdict = conclude(end.files, results, ci)
    code = end.exit_code if end.exit_code != ExitCode.OK else verdict.exit_code
    if as_json:
        fields = {"directory": str(end.files.root), "exit_code": int(code)}
        echo_json(fields | results.as_json())
    else:
        click.echo(end.files.root)
    if code != ExitCode.OK:
        sys.exit(code)


def _what_next(end: SweepEnd) -> list[str]:
    root = end.files.root
    lines = [f"report     {end.files.page}", f"results    {end.files.results_csv}"]
    if end.files.best_recipe.is_file():
        lines.append(f"best       {end.files.best_recipe}")
    if end.exit_code in (ExitCode.SAVED, ExitCode.INTERRUPTED):
        why = f"stopped by {end.stopped_by}" if end.stopped_by else "not done"
        lines.append(f"{why}: go on with `fsdpq sweep {root}`")
    if any(outcome.status == "failed" for outcome in end.outcomes):
        lines.append(f"logs       {end.files.root / 'logs'}; again: `--retry-failed`")
    return lines


def show_trials(
    loaded: LoadedSpec, request: SweepRequest, screen: SweepScreen, *, as_json: bool
) -> None:
    """Prints the trials of a sweep, what became of them, and which cannot fit."""
    from fsdpq.cli.render import clean, render_table
    from fsdpq.sweep.running.flow import list_sweep

    rows = list_sweep(loaded, request, screen=screen)
    if as_json:
        fields = [
            {
                "id": row.trial.id, "label": row.trial.label, "settings": dict(row.trial.settings),
                "overrides": list(row.trial.overrides), "status": row.outcome.status,
                "reason": row.outcome.reason,
            }
            for row in rows
        ]  # fmt: skip
        echo_json({"trials": fields})
        return
    table = [
        (row.trial.id, row.outcome.status, row.trial.label, row.outcome.reason) for row in rows
    ]
    if table:
        for line in render_table([tuple(clean(cell) for cell in cells) for cells in table]):
            click.echo(line)
    if loaded.spec.strategy.kind == "optuna":
        say("further trials are asked for one after another: which ones depends on the results")
