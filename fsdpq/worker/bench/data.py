"""``fsdpq bench data``: preparing rows, beside TRL.

Both start from the same file of made-up rows, with an empty cache, in a process of their own, and
use as many processes as there are cores. Ours checks every row, tokenizes, packs, hashes and
writes; the reference is ``datasets.load_dataset`` and what TRL's trainer does with the rows
(template, tokenizer, labels, best-fit-decreasing packing). Imports are left out on both sides.
Memory is the anonymous memory of all processes together, at its highest: what is mapped from files
is left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fsdpq.errors import UsageError
from fsdpq.run_files.bench_record import (
    BenchResult,
    Cell,
    Column,
    Plot,
    Ratio,
    Spread,
    Table,
    ratio,
)
from fsdpq.run_files.benchmarks import BenchJob
from fsdpq.worker.bench.children import Work, run_children
from fsdpq.worker.bench.contender_processes import Tell
from fsdpq.worker.bench.made_up_rows import KINDS, make_model, make_rows

SEQ_LEN = 2048
OURS, THEIRS = "fsdpq", "TRL"
WAYS = {
    OURS: f"{__name__}:prepare_rows",
    THEIRS: "fsdpq.worker.bench.data_reference:prepare_with_trl",
}
MB = 1e6
COLUMNS = (
    Column("rows", "rows"),
    Column("contender", ""),
    Column("rows_per_s", "rows/s"),
    Column("seconds", "wall, s", 1),
    Column("cpu_s", "s of a core", 1),
    Column("peak_mb", "peak, MB"),
    Column("sequences", "sequences"),
    Column("filled", "filled", 4),
    Column("tokens", "tokens"),
)

Runs = dict[str, list[dict[str, Any]]]


def measure_data(job: BenchJob, tell: Tell) -> BenchResult:
    """Returns what preparing takes, for every kind of rows."""
    kinds = job.words("kinds")
    if not kinds or not set(kinds) <= set(KINDS):
        raise UsageError(f"`data.kinds={job.text('kinds')}`", f"kinds are {', '.join(KINDS)}")
    rows: list[dict[str, Cell]] = []
    ratios: list[Ratio] = []
    bars: dict[str, dict[str, float]] = {}
    for kind in kinds:
        found = _measure_kind(job, kind, tell)
        for who, runs in found.items():
            rows.append(_row(f"{job.number('rows'):,} {kind}", who, runs))
            speed = Spread.of([run["rows"] / run["seconds"] for run in runs])
            bars.setdefault(kind, {})[who] = speed.median
        ratios += _ratios(kind, found)
    title = f"rows to packed sequences of {SEQ_LEN} tokens, {job.threads} processes"
    plot = Plot("data-speed", "Preparing rows", "", "rows/s", bars=bars)
    return BenchResult([Table(title, COLUMNS, rows)], ratios, [plot])


def _measure_kind(job: BenchJob, kind: str, tell: Tell) -> Runs:
    """Runs all ways in turns."""
    folder = job.directory / kind
    make_model(folder / "model", Path(job.tokenizer), chat=kind == "chat")
    tell(f"making up {job.number('rows'):,} rows of {kind}")
    file = folder / "rows.jsonl"
    make_rows(file, kind, job.number("rows"), folder / "model" / "tokenizer.json")
    ways = [OURS, THEIRS] if job.compare else [OURS]
    found: Runs = {who: [] for who in ways}
    for repeat in range(job.number("repeats")):
        for who in ways:
            tell(f"preparing {kind}, {who}, {repeat + 1} of {job.number('repeats')}")
            out = folder / f"{who}-{repeat}"
            arguments = {
                "rows": file, "model": folder / "model", "kind": kind, "out": out,
                "processes": job.threads,
            }  # fmt: skip
            peak = _Peak()
            # TRL's processes are as many as ours: one thread each.
            work = Work(f"{who} {kind}", WAYS[who], arguments)
            [measured] = run_children(work, folder, on_poll=peak.look)
            found[who].append(
                {**measured, "peak_bytes": peak.num_bytes, "rows": job.number("rows")}
            )
            shutil.rmtree(out, ignore_errors=True)
    return found


def prepare_rows(*, rows: str, model: str, kind: str, out: str, processes: int) -> dict[str, Any]:
    """Does what ``fsdpq prepare`` does, in one process; returns the time of it."""
    from fsdpq.data.preparing.prepare import Preparation, prepare_data
    from fsdpq.recipe.sections.data import DataOptions
    from fsdpq.rows.read import check_source
    from fsdpq.rows.source import DataSources, RowSource, SourceFile
    from fsdpq.worker.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(model))
    document = {"path": rows, "format": KINDS[kind], "seq_len": SEQ_LEN, "packing": "best_fit"}
    options = DataOptions.model_validate(document)
    Path(out).mkdir()
    clock = Clock()
    with Path(rows).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    files = (SourceFile(Path(rows), digest.hexdigest()),)
    source, _ = check_source(RowSource("rows", files, options.format, 0))
    sources = DataSources((source,))
    job = Preparation(sources, options, tokenizer, seed=0, num_processes=processes)
    report = prepare_data(job, Path(out), key={})
    seconds, cpu_s = clock.passed()
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "sequences": report.num_sequences,
        "filled": report.fill,
        "tokens": report.num_tokens,
    }


class Clock:
    """Measures wall time, and time on a core of this process and of children that have ended."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), sum(os.times()[:4])

    def passed(self) -> tuple[float, float]:
        """Returns both, since the clock was made."""
        return time.monotonic() - self._wall, sum(os.times()[:4]) - self._cpu


class _Peak:
    """Keeps the most anonymous memory of processes and their descendants that it saw."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def look(self, pids: Sequence[int]) -> None:
        """Looks once."""
        self.num_bytes = max(self.num_bytes, sum(map(anonymous_bytes, pids)))


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process and its descendants, shared pages counted once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        pids = [pid, *(child.pid for child in parent.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for each in pids:
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        match = re.search(r"^Pss_Anon:\s+(\d+) kB", text, re.MULTILINE)
        total += int(match[1]) * 1024 if match else 0
    return total


def _row(rows: str, who: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    last = runs[-1]
    return {
        "rows": rows,
        "contender": who,
        "rows_per_s": Spread.of([run["rows"] / run["seconds"] for run in runs]),
        "seconds": Spread.of([run["seconds"] for run in runs]).median,
        "cpu_s": Spread.of([run["cpu_s"] for run in runs]).median,
        "peak_mb": Spread.of([run["peak_bytes"] / MB for run in runs]).median,
        "sequences": last["sequences"],
        "filled": last["filled"],
        "tokens": last["tokens"],
    }


def _ratios(kind: str, found: Runs) -> list[Ratio]:
    if THEIRS not in found:
        return []

    def of(who: str, key: str) -> list[float]:
        return [run[key] for run in found[who]]

    return [
        ratio(
            f"rows/s of {kind}, of TRL", of(THEIRS, "seconds"), of(OURS, "seconds"),
            better="higher", target=1.0,
        ),
        ratio(
            f"peak of {kind}, of TRL", of(OURS, "peak_bytes"), of(THEIRS, "peak_bytes"),
            better="lower", target=1.0,
        ),
    ]  # fmt: skip
