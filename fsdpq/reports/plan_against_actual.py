"""What was planned beside what was measured: memory by phase, by category, of the host.

A GPU's allocator counts what it hands out, so a peak can be compared as it is. On a CPU there is
only the resident memory of the process: what is compared is how much it grew since the start, pages
of files left out. That includes holes that glibc's heap keeps, and modules that are imported late,
so small differences say nothing there. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fsdpq.plan.host import LAUNCHER_BYTES, TORCHRUN_BYTES
from fsdpq.plan.result import Phase
from fsdpq.run_files.amounts import format_bytes

Row = dict[str, Any]

PHASES: tuple[Phase, ...] = ("load", "init", "forward", "backward", "optimizer")
CATEGORIES = ("codes", "scales", "plain", "trained", "gradients", "optimizer")
"""Those that can be counted in a run (`fsdpq.metrics.held`)."""

TOLERANCE = 0.10
FLOORS = {"cuda": 128 << 20, "cpu": 256 << 20}
"""Bytes that a phase may differ by whatever its size. A rank that trains a tiny model on a CPU
grows by 20 to 40 MiB, of modules that are imported late; heaps keep holes of up to 32 MiB each."""

CATEGORY_FLOOR = 16 << 20
HOST_FLOOR = 1 << 30
"""Of a machine with GPUs: what CUDA and the libraries take was measured on one machine only."""


@dataclass(frozen=True)
class Compared:
    """A number of the plan and its measurement.

    Attributes:
        name: of a phase, a category or a sum.
        predicted_bytes: by the plan.
        measured_bytes: of rank 0; of the host over all ranks of the machine.
        difference: measured over predicted, less 1; None where nothing was predicted.
        drifts: it is further off than can be explained.
    """

    name: str
    predicted_bytes: int
    measured_bytes: int
    difference: float | None
    drifts: bool


@dataclass(frozen=True)
class Actual:
    """What a run measured.

    Attributes:
        memory: rows of every phase, in order, of the last start (`fsdpq.run_files.rows`).
        held: ``held`` rows of the same start.
        host_bytes: most resident memory of each rank, empty before the end.
    """

    memory: Sequence[Row]
    held: Sequence[Row]
    host_bytes: Sequence[int] = ()


def compare_with_plan(plan: Mapping[str, Any], actual: Actual) -> Row | None:
    """Returns the comparison as JSON data; None where there is nothing to compare.

    Args:
        plan: content of ``plan.json`` (`fsdpq.plan.as_json`).
        actual: of the run.
    """
    device = plan.get("device")
    if not isinstance(device, dict) or not actual.memory:
        return None
    kind = device.get("type", "cuda")
    full = _was_full(plan, actual)
    phases = list(_phases(device["moments"], actual, kind, full=full))
    sums = list(_sums(plan, actual, kind, full=full))
    categories = list(_categories(device["moments"], actual))
    found = [*phases, *sums, *categories]
    return {
        "device": kind,
        "phases": [asdict(row) for row in phases],
        "sums": [asdict(row) for row in sums],
        "categories": [asdict(row) for row in categories],
        "full_micro_batches": full,
        "drift": _drift_line([row for row in found if row.drifts]),
    }


def _phases(moments: list[Row], actual: Actual, kind: str, *, full: bool) -> Iterator[Compared]:
    for phase in PHASES:
        planned = [_planned(moment, kind) for moment in moments if moment["phase"] == phase]
        measured = [_used(row, actual, kind) for row in actual.memory if row["phase"] == phase]
        if planned and measured:
            depends = phase in ("forward", "backward", "optimizer")
            yield _compare(
                phase, max(planned), max(measured), floor=FLOORS[kind], below=full or not depends
            )


def _planned(moment: Row, kind: str) -> int:
    """Returns what a moment adds to an idle process: on a CPU with holes, on a GPU without."""
    if kind == "cuda":
        return moment["allocated_bytes"]
    return moment["bytes"] - moment["parts"].get("context", 0)


def _used(row: Row, actual: Actual, kind: str) -> int:
    """Returns the most that was used within a phase; on a CPU over the start."""
    if kind == "cuda":
        return row["peak_bytes"]
    start = actual.memory[0]
    mapped = row["bytes"] - row.get("anonymous_bytes", row["bytes"])
    return max(0, row["peak_bytes"] - mapped - start.get("anonymous_bytes", start["bytes"]))


def _sums(plan: Mapping[str, Any], actual: Actual, kind: str, *, full: bool) -> Iterator[Compared]:
    """Yields what torch reserved on the device, and the host memory of the machine."""
    if kind != "cuda":
        return
    device, host = plan["device"], plan["host"]
    reserved = max((row.get("reserved_bytes") or 0 for row in actual.memory), default=0)
    if reserved:
        planned = max(
            moment["bytes"] - moment["parts"].get("context", 0) for moment in device["moments"]
        )
        yield _compare("reserved by torch", planned, reserved, floor=HOST_FLOOR, below=False)
    num_local = (plan.get("workload") or {}).get("num_local_ranks", len(actual.host_bytes))
    if used := sum(actual.host_bytes[:num_local]):
        planned = host["peak_bytes"] - LAUNCHER_BYTES - TORCHRUN_BYTES
        yield _compare("host, all ranks of a machine", planned, used, floor=HOST_FLOOR, below=full)


def _categories(moments: list[Row], actual: Actual) -> Iterator[Compared]:
    """Yields what tensors hold between two steps; predicted for the optimizer's step."""
    at = [moment for moment in moments if moment["phase"] == "optimizer"]
    if not at or not actual.held:
        return
    parts = max(at, key=lambda moment: moment["bytes"])["parts"]
    held = actual.held[-1].get("device", {})
    for name in CATEGORIES:
        predicted, measured = parts.get(name, 0), held.get(name, 0)
        if predicted or measured:
            yield _compare(name, predicted, measured, floor=CATEGORY_FLOOR)


def _compare(
    name: str, predicted: int, measured: int, *, floor: int, below: bool = True
) -> Compared:
    """Compares two numbers.

    Args:
        name: of both.
        predicted: by the plan.
        measured: in the run.
        floor: bytes that they may differ by in any case.
        below: less than predicted is a drift, too.
    """
    off = measured - predicted
    drifts = abs(off) > max(floor, TOLERANCE * predicted) and (off > 0 or below)
    return Compared(name, predicted, measured, off / predicted if predicted else None, drifts)


def _was_full(plan: Mapping[str, Any], actual: Actual) -> bool:
    """Whether the measured steps had a micro-batch as large as the plan takes every one to be."""
    work = plan.get("workload") or {}
    most = max((row.get("tokens", 0) for row in actual.held), default=0)
    return most >= work.get("rows", 0) * work.get("seq_len", 0)


def _drift_line(drifts: Sequence[Compared]) -> str | None:
    """Returns the one line that asks for a bug report, about the worst of ``drifts``."""
    if not drifts:
        return None
    worst = max(drifts, key=lambda row: abs(row.measured_bytes - row.predicted_bytes))
    side = "above" if worst.measured_bytes > worst.predicted_bytes else "below"
    by = "" if worst.difference is None else f"{abs(worst.difference):.0%} "
    return (
        f"memory was {by}{side} the plan ({worst.name}: {format_bytes(worst.measured_bytes)}, "
        f"planned {format_bytes(worst.predicted_bytes)}): one of them is wrong; please file a bug "
        "report with plan.json and report.json of this run"
    )
