"""``fsdpq bench step``: a training step over NF4 with LoRA, beside what stock libraries do.

Every contender is a process that holds the same random Llama in NF4 with double quantization and
LoRA on all linears, and trains on the same batch with checkpointed layers, AdamW and clipped
gradients. On a CPU they take turns, one step each, so that a busy machine slows all of them alike;
on a GPU they run one after the other. Between the steps the rate of matrix products is measured
with the model's own shapes.

- share: the counted products of a step, layers computed twice, over its seconds and that rate; a
  contender that computes less has a higher share. Model FLOP utilisation (MFU) counts every layer
  once.
- peak: ``VmHWM`` of the process, set back before the steps of each batch, libraries included; on a
  GPU what the allocator of torch handed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from fsdpq.worker.bench.contender_processes import (
    Found,
    Measured,
    Rounds,
    Tell,
    contender_names,
    measure_together,
)
from fsdpq.worker.bench.contenders import (
    DTYPES,
    OURS,
    PREPARED,
    RATE,
    UNPREPARED,
    ContenderOptions,
    write_checkpoint,
)
from fsdpq.worker.bench.shapes import Batch, Shape, find_shape, step_flops

MB = 1e6
SPEED_TARGETS = {"cpu": 1.0, "cuda": 1.3}
AUTO_TARGET = 1.25
MEMORY_TARGETS = {"1x512": 0.85, "2x2048": 0.6}
"""Of the reference's peak on a CPU, by batch."""

GPU_MEMORY_TARGET = 0.8
LARGEST_ON_DISK = 10**9
"""Weights of the largest model that is written as a checkpoint; others are made on the device."""

COLUMNS = (
    Column("batch", "rows x tokens"),
    Column("dtype", "dtype"),
    Column("contender", ""),
    Column("tokens_per_s", "tokens/s", 1),
    Column("cpu_s", "CPU s a step", 2),
    Column("share", "of the matmul rate", 2),
    Column("mfu", "MFU", 2),
    Column("peak_mb", "peak, MB"),
    Column("first_loss", "first loss", 4),
    Column("last_loss", "last loss", 4),
)


def measure_step(job: BenchJob, tell: Tell) -> BenchResult:
    """Returns speed and peaks of a step, and what they are of the reference's."""
    shape = find_shape(job.text("shape"), job.number("layers"))
    batches = [Batch.parse(text) for text in job.words("batches")]
    dtypes = job.words("dtypes")
    if not batches or not dtypes or not set(dtypes) <= set(DTYPES):
        known = " ".join(DTYPES)
        raise UsageError(f"`step.dtypes={' '.join(dtypes)}`", hint=f"dtypes are {known}")
    contenders = [OURS, PREPARED, UNPREPARED] if job.compare else [OURS]
    found = _measure(job, shape, batches, contender_names(contenders, dtypes), tell)
    rates = {
        (dtype, batch): Spread.of(found[f"{RATE}:{dtype}", batch].losses[1:])
        for dtype in dtypes
        for batch in batches
    }
    rows = _rows(found, rates, shape, job.number("lora_rank"))
    return BenchResult(
        [Table(_title(job, shape), COLUMNS, rows), _rate_table(rates)],
        _ratios(found, rates, job.device),
        [_plot(rows, "speed", "tokens_per_s", "tokens/s"), _plot(rows, "peak", "peak_mb", "MB")],
        _notes(found, rows),
    )


def _measure(
    job: BenchJob, shape: Shape, batches: Sequence[Batch], names: Sequence[str], tell: Tell
) -> Measured:
    """Runs all processes: together on a CPU, one after the other on a GPU."""
    tokens = max(batch.tokens for batch in batches)
    checkpoint = None
    if shape.num_weights <= LARGEST_ON_DISK and job.device == "cpu":
        checkpoint = job.directory / "model"
        tell("writing a random model")
        write_checkpoint(checkpoint, shape, tokens)
    options = ContenderOptions(shape, checkpoint, "", job.device, job.number("lora_rank"), tokens)
    count = job.number("rounds")
    rounds = Rounds(batches, lambda batch: max(1, count * 512 // batch.size))
    if job.device == "cuda":
        rounds = Rounds(batches, lambda _batch: count)
    found: Measured = {}
    for group in [names] if job.device == "cpu" else [[name] for name in names]:
        found |= measure_together(group, rounds, options=options, threads=job.threads, tell=tell)
    return found


Rates = dict[tuple[str, Batch], Spread]


def _rows(found: Measured, rates: Rates, shape: Shape, lora_rank: int) -> list[dict[str, Cell]]:
    """Returns a row for each contender and batch."""
    rows: list[dict[str, Cell]] = []
    for (name, batch), one in found.items():
        contender, _, dtype = name.partition(":")
        if contender == RATE or not one.seconds:
            continue
        step_s, rate = Spread.of(one.seconds).median, rates[dtype, batch].median
        done, model = (
            step_flops(shape, batch, lora_rank=lora_rank, recompute=recompute) / step_s / rate
            for recompute in (True, False)
        )
        rows.append(
            {
                "contender": contender,
                "dtype": dtype,
                "batch": str(batch),
                "tokens_per_s": Spread.of([batch.size / seconds for seconds in one.seconds]),
                "cpu_s": Spread.of(one.cpu_seconds).median,
                "share": done,
                "mfu": model,
                "peak_mb": one.peak_bytes / MB,
                "host_mb": one.host_bytes / MB,
                "first_loss": one.losses[0],
                "last_loss": one.losses[-1],
            }
        )
    return sorted(rows, key=lambda row: (str(row["batch"]), str(row["dtype"])))


def _rate_table(rates: Rates) -> Table:
    columns = (
        Column("batch", "rows x tokens"), Column("dtype", "dtype"),
        Column("gflops_per_s", "GFLOP/s", 0),
    )  # fmt: skip
    rows: list[dict[str, Cell]] = [
        {"batch": str(batch), "dtype": dtype, "gflops_per_s": rate.scaled(1e-9)}
        for (dtype, batch), rate in rates.items()
    ]
    return Table("matrix products of this shape alone, between the steps", columns, rows)


def _ratios(found: Measured, rates: Rates, device: str) -> list[Ratio]:
    """Returns what is compared with the reference; nothing where there is none."""
    ratios: list[Ratio] = []
    for (name, batch), theirs in found.items():
        who, _, dtype = name.partition(":")
        ours = found.get((f"{OURS}:{dtype}", batch))
        if who in (OURS, RATE) or ours is None or not theirs.seconds:
            continue
        label = f"{batch} {dtype}, of {who}"
        memory = MEMORY_TARGETS.get(str(batch), 1.0) if device == "cpu" else GPU_MEMORY_TARGET
        ratios += [
            _speed(f"tokens/s, {label}", ours, theirs, SPEED_TARGETS[device]),
            ratio(
                f"peak, {label}", [ours.peak_bytes], [theirs.peak_bytes],
                better="lower", target=memory,
            ),
        ]  # fmt: skip
        faster = max((dtype for dtype, _ in rates), key=lambda one: rates[one, batch].median)
        best = found.get((f"{OURS}:{faster}", batch))
        if device == "cpu" and dtype == "bf16" != faster and best is not None:
            label = f"tokens/s, {batch} in the faster dtype ({faster}), of bf16 {who}"
            ratios.append(_speed(label, best, theirs, AUTO_TARGET))
    return ratios


def _speed(label: str, ours: Found, theirs: Found, target: float) -> Ratio:
    return ratio(label, theirs.seconds, ours.seconds, better="higher", target=target)


def _title(job: BenchJob, shape: Shape) -> str:
    where = f"{job.threads} threads" if job.device == "cpu" else "one GPU"
    return (
        f"{shape.num_weights / 1e6:,.1f} M weights, NF4 + double quantization, "
        f"LoRA r{job.number('lora_rank')}, {where}"
    )


def _plot(rows: Sequence[dict[str, Cell]], what: str, key: str, unit: str) -> Plot:
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        cell: Any = row[key]
        height = cell.median if isinstance(cell, Spread) else cell
        bars.setdefault(f"{row['batch']} {row['dtype']}", {})[str(row["contender"])] = height
    title = {"speed": "Training speed", "peak": "Peak memory of a step"}[what]
    return Plot(f"step-{what}", title, "", unit, bars=bars)


def _notes(found: Measured, rows: Sequence[dict[str, Cell]]) -> list[str]:
    lost = sorted({name for (name, _), one in found.items() if not one.seconds})
    notes = [f"{name} ran out of memory and is left out where it has no row" for name in lost]
    if any((row["contender"], row["dtype"]) == (PREPARED, "fp32") for row in rows):
        notes.append("in fp32 there is no unprepared: it would do the same as transformers")
    return notes
