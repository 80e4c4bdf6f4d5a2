"""What the worker of ``fsdpq bench`` does: one benchmark, its result as a file of JSON."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import TextIO

from fsdpq.run_files.benchmarks import BenchJob, find_benchmark
from fsdpq.run_files.writing import write_whole


def run_benchmark(name: str, job: Path, out: Path, output: TextIO) -> None:
    """Measures ``name`` and writes a `BenchResult` to ``out``.

    Args:
        name: of a row of `fsdpq.run_files.benchmarks.BENCHMARKS`.
        job: file of the `BenchJob`.
        out: file of the result.
        output: gets lines of JSON, ``text``: what it does now.

    Raises:
        FsdpqError: a setting is wrong, or a process failed.
    """

    def tell(text: str) -> None:
        output.write(json.dumps({"text": text}) + "\n")
        output.flush()

    measure = pkgutil.resolve_name(find_benchmark(name).function)
    result = measure(BenchJob.read(job), tell)
    write_whole(out, json.dumps(result.as_json(), indent=1).encode())
