"""Verbs that make or look at what a run reads, each one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.guard import recorded_errors


def add_input_verbs(verbs: Any) -> None:
    """Adds ``inspect``, ``prepare``, ``smoke-model`` and ``harness-data``."""
    inspect = verbs.add_parser("inspect")
    inspect.add_argument("run_dir", type=Path)
    inspect.add_argument("--samples", type=int, default=0)
    inspect.add_argument("--file", default="")
    inspect.add_argument("--row", type=int, default=0)
    inspect.add_argument("--out", type=Path, required=True)
    inspect.add_argument("--processes", type=int, required=True)
    inspect.add_argument("--trust-remote-code", action="store_true")
    inspect.set_defaults(run=_inspect)
    prepare = verbs.add_parser("prepare")
    prepare.add_argument("job", type=Path)
    prepare.add_argument("directory", type=Path)
    prepare.add_argument("--error", type=Path, required=True)
    prepare.add_argument("--processes", type=int, required=True)
    prepare.add_argument("--trust-remote-code", action="store_true")
    prepare.set_defaults(run=_prepare)
    smoke_model = verbs.add_parser("smoke-model")
    smoke_model.add_argument("spec", type=Path)
    smoke_model.add_argument("directory", type=Path)
    smoke_model.add_argument("--error", type=Path, required=True)
    smoke_model.set_defaults(run=_smoke_model)
    harness_data = verbs.add_parser("harness-data")
    harness_data.add_argument("--task", action="append", dest="tasks", required=True)
    harness_data.add_argument("--include-path", type=Path)
    harness_data.add_argument("--error", type=Path, required=True)
    harness_data.set_defaults(run=_harness_data)


def _inspect(parsed: argparse.Namespace, rank: int) -> None:
    files = RunFiles(parsed.run_dir)
    with recorded_errors(files.rank_error(rank), rank):
        from fsdpq.worker.inspect import Wanted, inspect

        inspect(
            files,
            Wanted(parsed.samples, parsed.file, parsed.row),
            output=parsed.out,
            num_processes=parsed.processes,
            trust_remote_code=parsed.trust_remote_code,
        )


def _prepare(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.prepare import prepare

        prepare(
            parsed.job,
            parsed.directory,
            num_processes=parsed.processes,
            trust_remote_code=parsed.trust_remote_code,
        )


def _smoke_model(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.smoke_model import build_smoke_model

        build_smoke_model(parsed.spec, parsed.directory)


def _harness_data(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.evaluate.tasks import fetch_tasks

        fetch_tasks(parsed.tasks, parsed.include_path)
