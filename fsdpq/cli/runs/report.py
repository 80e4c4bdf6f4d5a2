"""``fsdpq report``: the page of a run or sweep made again, or one page that compares runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.errors import EnvironmentProblemError, UsageError

COMPARISON = "comparison.html"


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Where the page goes; default: into the run, or beside the runs that are compared.",
)  # fmt: skip
@json_option
def report_command(runs: tuple[Path, ...], *, out: Path | None, as_json: bool) -> None:
    """Make the report of RUN again, or compare several runs on one page.

    RUN may also be the directory of a sweep, alone: its results are collected again.
    Runs that still run, failed, or are of an earlier version are shown as far as their files go.
    The page's path is printed on stdout; with --json what it shows, and a page only with --out.
    """
    if any(_is_sweep(run) for run in runs):
        content = _report_sweep(runs, out, as_json)
    elif len(runs) == 1:
        content = _report_one(runs[0], out, as_json)
    else:
        content = _compare(runs, out, as_json)
    if as_json:
        echo_json(content)


def _is_sweep(directory: Path) -> bool:
    from fsdpq.run_files.sweep_paths import SweepFiles

    files = SweepFiles(directory)
    return files.spec.is_file() and files.trials.is_file()


def _report_sweep(given: Sequence[Path], out: Path | None, as_json: bool) -> dict[str, Any]:
    from fsdpq.run_files.sweep_paths import SweepFiles
    from fsdpq.sweep.results.collect import collect_results, write_results

    files = SweepFiles(next(path for path in given if _is_sweep(path)))
    if len(given) > 1 or out is not None:
        message = f"`{files.root}` is a sweep, whose page compares its runs, and lies among them"
        hint = f"name it alone, without `--out`; or name runs of it: `{files.run('ID').root}`"
        raise UsageError(message, hint=hint)
    results = collect_results(files)
    if not as_json:
        try:
            write_results(files, results)
        except OSError as error:
            raise _cannot_write(files.page, error) from None
        click.echo(files.page)
    return results.as_json()


def _report_one(run: Path, out: Path | None, as_json: bool) -> dict[str, Any]:
    from fsdpq.launch.runs.compared import check_has_run, find_state
    from fsdpq.reports.report import render_html, report_content, write_report
    from fsdpq.reports.run_record import read_record
    from fsdpq.run_files.paths import RunFiles

    files = RunFiles(run)
    check_has_run(files)
    state = find_state(files)
    content = report_content(read_record(files), name=run.absolute().name, state=state)
    if out is not None:
        _write(out, render_html(content), as_json)
    elif not as_json:
        try:
            write_report(files, state=state)
        except OSError as error:
            raise _cannot_write(files.report_html, error) from None
        click.echo(files.report_html)
    return content


def _compare(runs: Sequence[Path], out: Path | None, as_json: bool) -> dict[str, Any]:
    from fsdpq.launch.runs.compared import compare_environments, read_runs
    from fsdpq.reports.comparison import comparison_content
    from fsdpq.reports.comparison_page import render_comparison

    compared = read_runs(runs)
    content = comparison_content(compared, compare_environments(compared))
    if out is not None or not as_json:
        page = out or Path(os.path.commonpath([run.absolute().parent for run in runs])) / COMPARISON
        links = [_link(run / "report.html", page) for run in runs]
        _write(page, render_comparison(content, compared, links=links), as_json)
    return content


def _link(report: Path, page: Path) -> str:
    """Returns the address of a run's report from where ``page`` will lie, empty without one."""
    if not report.is_file():
        return ""
    return quote(Path(os.path.relpath(report.absolute(), page.absolute().parent)).as_posix())


def _write(page: Path, html: str, as_json: bool) -> None:
    from fsdpq.run_files.writing import write_whole

    try:
        write_whole(page, html.encode())
    except OSError as error:
        raise _cannot_write(page, error) from None
    if not as_json:
        click.echo(page)


def _cannot_write(page: Path, error: OSError) -> EnvironmentProblemError:
    message = f"`{page}` cannot be written: {error.strerror or error}"
    return EnvironmentProblemError(message, hint="make room, or name another place with `--out`")
