"""What ``--json`` of a verb that trains prints: one document at the end, however the run ended."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click

from fsdpq.cli.answers import echo_json, error_fields
from fsdpq.cli.options import say
from fsdpq.cli.render import render_error
from fsdpq.cli.screens.plain import PlainScreen
from fsdpq.cli.screens.quiet import QuietScreen
from fsdpq.errors import ExitCode, FsdpqError, RunStoppedError
from fsdpq.launch.runs.lock_file import as_mapping
from fsdpq.launch.runs.status import read_status
from fsdpq.reports.run_record import RunRecord, read_record
from fsdpq.run_files.paths import RunFiles
from fsdpq.sweep.results.measures import measures_of
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints


@contextmanager
def summed_up(screen: PlainScreen, *, as_json: bool) -> Generator[None]:
    """Shows how far a run came that ends early within the block.

    Args:
        screen: of the run.
        as_json: print the document, and end here with the error's exit code.
    """
    try:
        yield
    except FsdpqError as error:
        screen.show_summary()
        if not as_json:
            raise
        _end_with(error, screen)
    except KeyboardInterrupt:
        if not as_json:
            raise
        _end_with(RunStoppedError("stopped before the ranks started"), screen)


def result_fields(files: RunFiles | None, error: FsdpqError | None = None) -> dict[str, Any]:
    """Returns what came of a run as plain data.

    Args:
        files: of the run, None where it got no directory.
        error: what ended it early.
    """
    code = ExitCode.OK if error is None else error.exit_code
    fields = error_fields(error) | {"exit_code": int(code)}
    if files is None or not files.root.is_dir():
        return fields | {"run_dir": None}
    status, record = read_status(files), read_record(files)
    return fields | {
        "run_dir": str(files.root),
        "name": status.name,
        "state": status.state,
        "step": status.step,
        "total_steps": status.total_steps,
        "measures": measures_of(record),
        "eval_loss_before": record.summary.get("eval_loss_before"),
        "tokens": record.summary.get("tokens"),
        "peak_memory_bytes_per_rank": record.summary.get("peak_memory_bytes", []),
        "peak_host_bytes_per_rank": record.summary.get("peak_host_bytes", []),
        "planned_bytes": _planned(record),
        "samples": record.samples,
        "paths": _paths(files, record),
    }


def echo_result(files: RunFiles, *, as_json: bool) -> None:
    """Prints on stdout what came of a run that is finished: its directory, or the document."""
    if as_json:
        echo_json(result_fields(files))
    else:
        click.echo(files.root)


def _planned(record: RunRecord) -> dict[str, int | None]:
    plan = record.plan
    found = {name: as_mapping(plan.get(name)).get("peak_bytes") for name in ("device", "host")}
    return {name: peak if isinstance(peak, int) else None for name, peak in found.items()}


def _paths(files: RunFiles, record: RunRecord) -> dict[str, str | None]:
    saved = list_checkpoints(files.checkpoints)
    there = {
        "metrics": files.metrics, "events": files.events, "logs": files.logs,
        "report": files.report_html, "report_json": files.report_json, "merged": files.merged,
    }  # fmt: skip
    found = {name: str(path) if path.exists() else None for name, path in there.items()}
    return found | {
        "exported": record.summary.get("adapter"),
        "checkpoint": str(saved[0]) if saved else None,
    }


def _end_with(error: FsdpqError, screen: PlainScreen) -> None:
    if not isinstance(screen, QuietScreen):
        say(str(error) if isinstance(error, RunStoppedError) else render_error(error))
    echo_json(result_fields(screen.files, error))
    sys.exit(error.exit_code)
