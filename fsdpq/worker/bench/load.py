"""``fsdpq bench load``: a bf16 checkpoint becomes NF4 with double quantization.

By several numbers of ranks of fsdpq, each of which keeps its rows, and by processes of
``AutoModelForCausalLM.from_pretrained``, each of which holds the whole model. Every process is
fresh, has ``cores / processes`` threads (one rank runs on a single thread too, to compare ranks
with), and loads a tiny model first, so that imports and what libraries set up on first use lie in
its baseline.

- peak: on a CPU ``VmHWM`` at the end, set back before the load, less ``VmRSS`` at that moment;
  file-backed pages count. On a GPU the most that torch's allocator handed out.
- read: growth of ``rchar`` in /proc/self/io, over all ranks. Mappings, as in transformers, are not
  counted there.
- wall: from before the model is built until it is loaded, the slowest process.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fsdpq.dist import start_process_group, wait_for_all, world_size
from fsdpq.errors import UsageError
from fsdpq.metrics.peaks import peaks, reset_peaks, status_bytes, synchronize
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
from fsdpq.worker.assemble import assemble_model
from fsdpq.worker.bench.children import Work, run_children
from fsdpq.worker.bench.contender_processes import Tell
from fsdpq.worker.bench.contenders import OURS, PREPARED, ContenderOptions, recipe_of
from fsdpq.worker.bench.made_up import write_made_up
from fsdpq.worker.bench.shapes import SHAPES, find_shape

MB, GB = 1e6, 1e9
REFERENCE_PROCESSES = (1, 2)
COLUMNS = (
    Column("contender", ""),
    Column("ranks", "processes"),
    Column("threads", "threads each"),
    Column("wall_s", "wall, s", 1),
    Column("peak_mb", "peak, MB"),
    Column("own_mb", "own weights, MB"),
    Column("over_mb", "over own, MB"),
    Column("read", "read, of the checkpoint", 3),
)

Group = tuple[str, int, int]
"""Contender, processes, threads each."""


def measure_load(job: BenchJob, tell: Tell) -> BenchResult:
    """Returns time, memory and bytes read of loading, beside the reference's."""
    shape = find_shape(job.text("shape"), job.number("layers"))
    ranks = job.words("ranks")
    if not ranks or not all(text.isdecimal() and int(text) for text in ranks):
        raise UsageError(f"`load.ranks={job.text('ranks')}`", hint="for example `load.ranks=1 2`")
    tell(f"writing {2 * shape.num_weights / GB:.2f} GB of weights")
    write_made_up(job.directory / "tiny", SHAPES["tiny"])
    weight_bytes = write_made_up(job.directory / "model", shape)
    groups = list_groups(job, [int(text) for text in ranks])
    found: dict[Group, list[dict[str, Any]]] = {group: [] for group in groups}
    for _ in range(job.number("repeats")):
        for group, runs in found.items():
            tell(f"loading: {group[0]}, {group[1]} processes of {group[2]} threads")
            runs.append(_run(group, job))
    rows = [_row(group, runs, weight_bytes) for group, runs in found.items()]
    title = f"{weight_bytes / GB:.2f} GB of bf16 weights to NF4 + double quantization"
    return BenchResult(
        [Table(title, COLUMNS, rows)],
        _ratios(found, weight_bytes),
        [_plot(rows)],
        _notes(job),
    )


def list_groups(job: BenchJob, ranks: Sequence[int]) -> list[Group]:
    """Returns what is measured; on a GPU one process a contender."""
    threads = job.threads
    if job.device == "cuda":
        return [(OURS, 1, threads)] + ([(PREPARED, 1, threads)] if job.compare else [])
    groups = [(OURS, 1, 1)] if 1 in ranks and threads > 1 else []
    groups += [(OURS, n, max(1, threads // n)) for n in ranks]
    if job.compare:
        groups += [(PREPARED, n, max(1, threads // n)) for n in REFERENCE_PROCESSES if n in ranks]
    return groups


def _run(group: Group, job: BenchJob) -> dict[str, Any]:
    """Runs one group of processes and returns what they measured together."""
    who, num_ranks, threads = group
    arguments = {"who": who, "root": job.directory, "device": job.device}
    work = Work(f"{who} {num_ranks}", f"{__name__}:load_once", arguments, num_ranks, threads)
    found = run_children(work, job.directory)
    return {
        "wall_s": max(one["wall_s"] for one in found),
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "own_bytes": max(one["own_bytes"] for one in found),
        "over_bytes": max(one["peak_bytes"] - one["own_bytes"] for one in found),
        "read_bytes": sum(one["read_bytes"] for one in found),
    }


def load_once(*, who: str, root: str, device: str) -> dict[str, Any]:
    """Warms up, loads, returns what it measured; in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    where = start_process_group(device)
    load = _load_fsdpq if who == OURS else _load_stock
    load(Path(root) / "tiny", where)
    gc.collect()
    wait_for_all()
    reset_peaks(where)
    on_gpu = where.type == "cuda"
    baseline = torch.cuda.memory_allocated(where) if on_gpu else status_bytes("VmRSS")
    read_before, started = _read_bytes(), time.perf_counter()
    own_bytes = load(Path(root) / "model", where)
    synchronize(where)
    wall_s = time.perf_counter() - started
    found = {
        "wall_s": wall_s,
        "peak_bytes": peaks(where)["peak_bytes"] - baseline,
        "read_bytes": _read_bytes() - read_before,
        "own_bytes": own_bytes(),
    }
    wait_for_all()
    return found


def _load_fsdpq(directory: Path, device: torch.device) -> Callable[[], int]:
    """Loads; returns a function for the bytes of this rank's shards."""
    options = ContenderOptions(SHAPES["tiny"], directory, "bf16", device.type, 1, 2048)
    ranks = {"nproc_per_node": world_size()}
    recipe = recipe_of(options, launch=ranks, training={"global_batch_size": world_size()})
    loaded = assemble_model(recipe, directory, device=device, report_load=lambda _done, _all: None)
    return lambda: loaded.own_bytes(trainable=False) + loaded.own_bytes(trainable=True)


def _load_stock(directory: Path, device: torch.device) -> Callable[[], int]:
    """Loads; returns a function for the bytes of the model."""
    from fsdpq.worker.bench.reference import load_4bit

    model = load_4bit(directory, dtype=torch.bfloat16, device=device)
    return lambda: sum(tensor.nbytes for tensor in model.parameters())


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split()[1])


def _row(group: Group, runs: Sequence[Mapping[str, Any]], weight_bytes: int) -> dict[str, Cell]:
    who, num_ranks, threads = group
    last = runs[-1]
    read = last["read_bytes"] / weight_bytes
    return {
        "contender": who,
        "ranks": num_ranks,
        "threads": threads,
        "wall_s": Spread.of([run["wall_s"] for run in runs]),
        "peak_mb": Spread.of([run["peak_bytes"] / MB for run in runs]),
        "own_mb": last["own_bytes"] / MB,
        "over_mb": Spread.of([run["over_bytes"] / MB for run in runs]),
        "read": "mapped" if who == PREPARED else read,
    }


def _ratios(found: Mapping[Group, list[dict[str, Any]]], weight_bytes: int) -> list[Ratio]:
    def of(key: str, group: Group) -> list[float]:
        return [run[key] for run in found[group]]

    ratios: list[Ratio] = []
    ours = {group[1]: group for group in found if group[0] == OURS}
    theirs = {group[1]: group for group in found if group[0] == PREPARED}
    for n, group in ours.items():
        read = [value / weight_bytes for value in of("read_bytes", group)]
        ratios.append(
            ratio(f"read by {n} rank{'s' * (n > 1)}, of the checkpoint", read, [1.0] * len(read),
                  better="lower", target=1.1)
        )  # fmt: skip
    alone = (OURS, 1, 1)
    if alone in found and 2 in ours and ours[2][2] == 1:
        ratios.append(
            ratio("wall, 2 ranks of 1 rank, a thread each", of("wall_s", ours[2]),
                  of("wall_s", alone), better="lower", target=0.65)
        )  # fmt: skip
    for n, group in theirs.items():
        for key, what, target in (("wall_s", "wall", 0.6), ("peak_bytes", "peak", 0.5)):
            aim = target if n > 1 else 1.0
            name = f"{what} at {n} process{'es' * (n > 1)}, of transformers"
            above, below = of(key, ours[n]), of(key, group)
            ratios.append(ratio(name, above, below, better="lower", target=aim))
    return ratios


def _plot(rows: Sequence[Mapping[str, Cell]]) -> Plot:
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        cell = row["peak_mb"]
        height = cell.median if isinstance(cell, Spread) else 0.0
        bars.setdefault(f"{row['ranks']} x {row['threads']} threads", {})[str(row["contender"])] = (
            height
        )
    return Plot("load-peak", "Peak memory of a process while it loads", "", "MB", bars=bars)


def _notes(job: BenchJob) -> list[str]:
    notes = ["the files are in the page cache; `mapped` files do not count as read"]
    if job.device == "cuda":
        notes.append("peaks are those of torch's allocator on the GPU")
    return notes
