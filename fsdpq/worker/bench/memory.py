"""``fsdpq bench memory``: the memory of a step by phase, length, method and strategy.

A made-up Llama in bf16 is trained by the worker's own code, each setup in fresh processes of one
thread, which train a tiny model first: what libraries set up on first use lies in the baseline.

- By phase, in the first step: resident memory over the libraries at its end, and the most within it
  (``VmHWM``, set back at each phase through /proc/self/clear_refs). On a GPU, its allocator's.
- Steps after it: the most that torch's allocator held beyond what it held before the step, and the
  largest single allocation; for several lengths with a straight line fitted to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.run_files.bench_record import BenchResult, Cell, Column, Plot, Ratio, Table, ratio
from fsdpq.run_files.benchmarks import BenchJob
from fsdpq.worker.bench.allocations import fit_line
from fsdpq.worker.bench.children import Work, run_children
from fsdpq.worker.bench.contender_processes import Tell
from fsdpq.worker.bench.made_up import write_made_up
from fsdpq.worker.bench.memory_setups import LENGTH, Setup, choose_setups, lacking, list_setups
from fsdpq.worker.bench.shapes import SHAPES, Shape, find_shape

MB = 1e6
PHASES = ("load", "init", "forward", "backward", "optimizer")
PROCESS = "fsdpq.worker.bench.memory_process"
MAX_TOKENS = 16384
MOST_AT_ONCE = 4
"""Setups that a CPU measures at the same time: each needs 1 to 2 GB, and none is timed."""

NOTES = (
    "frozen and trained: weights of a rank, by arithmetic",
    "a step allocates: the most that torch held in a step over what it held before it",
)
CURVES = ("lora", "dora", "PEFT lora")
"""Setups of the plot."""

Found = dict[str, dict[str, Any]]
"""By the setup's name: what its rank with the highest peak measured."""


def measure_memory(job: BenchJob, tell: Tell) -> BenchResult:
    """Returns the memory of every setup."""
    shape = find_shape(job.text("shape"))
    lengths = _lengths(job)
    chosen = choose_setups(job.text("setups"), list_setups(lengths, compare=job.compare))
    setups = [setup for setup in chosen if not lacking(setup)]
    notes = [*NOTES, *(f"{setup.name}: {lacking(setup)}" for setup in chosen if lacking(setup))]
    tell("writing a random model and its quantized base")
    write_made_up(job.directory / "tiny", SHAPES["tiny"], tokens=MAX_TOKENS)
    write_made_up(job.directory / "model", shape, tokens=MAX_TOKENS)
    arguments = {"root": job.directory, "device": job.device}
    run_children(Work("base", f"{PROCESS}:write_bases", arguments), job.directory)

    def run(setup: Setup) -> dict[str, Any]:
        tell(f"measuring {setup.name}")
        about = {"setup": asdict(setup), **arguments}
        name = f"{PROCESS}:measure_setup"
        return _worst(run_children(Work(setup.name, name, about, setup.num_ranks), job.directory))

    with ThreadPoolExecutor(min(job.threads, MOST_AT_ONCE) if job.device == "cpu" else 1) as pool:
        found = {s.name: one for s, one in zip(setups, pool.map(run, setups), strict=True)}
    title = f"{shape.num_weights / 1e6:,.1f} M weights, MB over the libraries"
    tables = [Table(title, _phase_columns(), _phase_rows(found, lengths))]
    if any(len(row["steps"]) > 1 for row in found.values()):
        tables.append(_length_table(found, lengths))
    return BenchResult(tables, _ratios(found, shape, lengths), [_plot(found)], notes)


def _lengths(job: BenchJob) -> list[int]:
    texts = job.words("lengths")
    if len(texts) < 4 or not all(text.isdecimal() and int(text) > 8 for text in texts):
        hint = "at least four, for the straight line: `memory.lengths=512 1024 2048 4096`"
        raise UsageError(f"`memory.lengths={job.text('lengths')}`", hint)
    return sorted(int(text) for text in texts)


def _worst(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one setup's row: of its ranks, the one with the higher peak over its libraries."""
    rows = [{**one, "over": _over_libraries(one)} for one in found]
    return max(rows, key=lambda row: max(use["peak"] for use in row["over"].values()))


def _over_libraries(found: dict[str, Any]) -> dict[str, dict[str, int]]:
    base = found["phases"]["libraries"]
    return {
        name: {
            "now": use["now"] - base["now"],
            "peak": use["peak"] - base["now"],
            "anonymous": use["anonymous"] - base["anonymous"],
        }
        for name, use in found["phases"].items()
        if name != "libraries"
    }


def _phase_columns() -> list[Column]:
    columns = [Column("setup", "")]
    columns += [Column(key, key) for key in ("frozen", "trained", "loaded")]
    columns += [Column(phase, f"{phase}, peak") for phase in PHASES]
    return [*columns, Column("step", "a step allocates")]


def _phase_rows(found: Found, lengths: Sequence[int]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for name, row in found.items():
        over = row["over"]
        numbers = {
            "frozen": row["frozen_bytes"],
            "trained": row["trained_bytes"],
            "loaded": over.get("init", over["load"])["anonymous"],
            **{phase: over[phase]["peak"] if phase in over else 0 for phase in PHASES},
            "step": _step(row, _nearest(lengths))["peak"],
        }
        rows.append({"setup": name, **{key: number / MB for key, number in numbers.items()}})
    return rows


def _nearest(lengths: Sequence[int]) -> int:
    return min(lengths, key=lambda length: abs(length - LENGTH))


def _step(row: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns the measured step of a row whose length is nearest."""
    return row["steps"][min(row["steps"], key=lambda n: abs(int(n) - length))]


def _length_table(found: Found, lengths: Sequence[int]) -> Table:
    """Returns what a step allocates at every length, with a straight line through the backward.

    The forward's peak is in the loss, which grows up to one chunk of logits and no further.
    """
    columns = [Column("setup", "MB that a step allocates, by length"), Column("phase", "")]
    columns += [Column(str(length), str(length), 1) for length in lengths]
    columns += [Column("line", "line"), Column("r_squared", "R²", 5)]
    columns.append(Column("quadratic", "n²", 3))
    rows: list[dict[str, Cell]] = []
    for name, row in found.items():
        if len(row["steps"]) < 4:
            continue
        for phase in ("forward", "backward"):
            peaks = {n: step["phases"][phase] for n, step in row["steps"].items()}
            cells: dict[str, Cell] = {n: peak / MB for n, peak in peaks.items()}
            if phase == "backward":
                fit = fit_line([int(n) for n in peaks], list(peaks.values()))
                line = f"{fit.base_bytes / MB:.1f} MB + {fit.token_bytes / 1e3:.1f} kB n"
                cells |= {"line": line, "r_squared": fit.r_squared}
                cells["quadratic"] = fit.quadratic_share
            rows.append({"setup": name, "phase": phase, **cells})
    return Table("by length", columns, rows)


def _ratios(found: Found, shape: Shape, lengths: Sequence[int]) -> list[Ratio]:
    """Returns methods beside each other and beside PEFT's, and what is left of all logits."""
    one, longest = _nearest(lengths), lengths[-1]
    ratios: list[Ratio] = []
    for name, other in (("dora", "lora"), ("PEFT dora", "PEFT lora"), ("lora", "PEFT lora")):
        if not (name in found and other in found):
            continue
        for length in dict.fromkeys((one, longest) if other == "PEFT lora" else (one,)):
            pair = (_peak(found[name], length), _peak(found[other], length))
            ratios.append(_ratio(f"{name} / {other}, a step of {length} tokens", *pair))
        pair = (_resident(found[name]), _resident(found[other]))
        ratios.append(_ratio(f"{name} / {other}, resident", *pair))
    for name in ("lora", "PEFT lora"):
        for length in dict.fromkeys((one, longest)) if name in found else ():
            largest = _step(found[name], length)["largest"]
            if largest is not None:  # a GPU's allocator does not tell
                what = f"{name}'s largest piece / all logits, {length} tokens"
                ratios.append(_ratio(what, largest, length * shape.vocab * 4.0))
    return ratios


def _ratio(what: str, above: float, below: float) -> Ratio:
    return ratio(what, [above], [below], better="lower")


def _peak(row: Mapping[str, Any], length: int) -> float:
    return float(_step(row, length)["peak"])


def _resident(row: Mapping[str, Any]) -> float:
    return float(max(use["peak"] for use in row["over"].values()))


def _plot(found: Found) -> Plot:
    lines = {
        name: [(float(n), step["peak"] / MB) for n, step in found[name]["steps"].items()]
        for name in CURVES
        if name in found
    }
    title = "Allocated by a training step, over weights and optimizer states"
    return Plot("memory-length", title, "tokens in the row", "MB", lines=lines)
