"""Verbs of ``fsdpq bench``: one benchmark, and the processes that it starts itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fsdpq.worker.guard import recorded_errors, take_output


def add_bench_verbs(verbs: Any) -> None:
    """Adds ``bench`` and ``bench-child``."""
    bench = verbs.add_parser("bench")
    bench.add_argument("name")
    bench.add_argument("job", type=Path)
    bench.add_argument("--out", type=Path, required=True)
    bench.add_argument("--error", type=Path, required=True)
    bench.set_defaults(run=_bench)
    child = verbs.add_parser("bench-child")
    child.add_argument("function")
    child.add_argument("arguments", type=Path)
    child.add_argument("out", type=Path)
    child.add_argument("--error", type=Path, required=True)
    child.set_defaults(run=_bench_child)


def _bench(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        output = take_output()  # before anything is imported that might print
        from fsdpq.worker.bench.run import run_benchmark

        run_benchmark(parsed.name, parsed.job, parsed.out, output)


def _bench_child(parsed: argparse.Namespace, rank: int) -> None:
    with recorded_errors(parsed.error, rank):
        from fsdpq.worker.bench.children import run_child

        run_child(parsed.function, parsed.arguments, parsed.out)
