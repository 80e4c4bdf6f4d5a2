"""The numbers of one run that sweeps are ranked, judged and compared by.

Every number is read from the files of the run directory, so the same run has the same numbers
whenever it is asked. Steps that a resumed run did twice count once (`fsdpq.reports.run_record`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeGuard

from fsdpq.recipe.describe import suggest
from fsdpq.reports.run_record import Row, RunRecord, read_measured
from fsdpq.reports.ticks import format_number
from fsdpq.run_files.amounts import format_bytes, format_count, format_duration
from fsdpq.run_files.evaluation_job import TRAINED
from fsdpq.run_files.paths import RunFiles

Measures = Mapping[str, float]
"""Name -> number; what was not measured has no entry."""

Direction = Literal["lower", "higher"]

LAST_STEPS = 10
"""`train_loss` is the mean over so many logged steps: one step's loss says little."""

OF_HELD_OUT_ROWS = ("eval_loss", "best_eval_loss", "perplexity")
LOSSES = (*OF_HELD_OUT_ROWS, "train_loss")
AMOUNTS = ("steps", "trained_tokens", "num_trainable")
DETERMINISTIC = (*LOSSES, *AMOUNTS)
"""The same however often a trial was interrupted; so are those of tasks (`is_deterministic`)."""

TIMINGS = ("tokens_per_s", "train_s", "wall_s", "peak_memory_bytes", "peak_host_bytes")
"""What the machine and what else ran on it have a part in."""

KNOWN = (*DETERMINISTIC, *TIMINGS)
TASKS = "tasks."
"""What names of evaluations start with: ``tasks.hellaswag.acc_norm``."""

LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier_score", "ter", "wer", "mse", "mae")
"""Metrics of tasks; of all others more is better."""


def read_measures(files: RunFiles, *, until: int | None = None) -> dict[str, float]:
    """Returns the numbers of a run, finished or not; those that it lacks are left out.

    ``eval_loss`` is the last held-out loss after a step and ``best_eval_loss`` the lowest, in nats
    a token; ``perplexity`` belongs to the last. ``train_loss`` is the mean of the last
    `LAST_STEPS` logged steps, ``tokens_per_s`` their median over the run. ``train_s`` is what the
    run says, ``wall_s`` how long its ranks ran over all starts, in seconds. Peaks are of the rank
    that has most, in bytes. ``tasks.<task>.<metric>`` is what was trained, by the last evaluation
    of that task.

    Args:
        files: the run directory.
        until: the step where the trial was ended early: what it did after that, before it was
            gone, does not count.
    """
    record = read_measured(files)
    if until is not None:
        record.steps = [row for row in record.steps if row["step"] <= until]
        record.evals = [row for row in record.evals if row["step"] <= until]
        record.summary = {}
    return measures_of(record)


def measures_of(record: RunRecord) -> dict[str, float]:
    """Returns the same of a run that was read already."""
    return {name: value for name, value in _measures(record) if _is_number(value)}


def is_known(name: str) -> bool:
    """Returns whether ``name`` can be a measure: one of `KNOWN`, or of a task."""
    return name in KNOWN or (name.startswith(TASKS) and name.count(".") > 1)


def explain_unknown(name: str) -> tuple[str, str]:
    """Returns what is wrong with a name that `is_known` refuses, and what to do."""
    guess = suggest(name, KNOWN)
    if guess:
        return f"`{name}` is no measure", f"did you mean `{guess}`?"
    known = ", ".join(f"`{known}`" for known in KNOWN)
    return (
        f"`{name}` is no measure",
        f"there are {known}, and `tasks.<task>.<metric>` of evaluations",
    )


def is_deterministic(name: str) -> bool:
    """Returns whether a measure says something about what was trained, not how fast."""
    return name not in TIMINGS


def direction_of(name: str) -> Direction:
    """Returns what of a measure is better."""
    if name.startswith(TASKS):
        metric = name.rpartition(".")[2].partition(",")[0]
        return "lower" if metric.endswith(LOWER_IS_BETTER) else "higher"
    return "higher" if name in ("tokens_per_s", *AMOUNTS) else "lower"


def format_measure(name: str, value: float | None) -> str:
    """Returns a measure for people; empty for None."""
    if value is None:
        return ""
    if name in LOSSES:
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_s") and name != "tokens_per_s":
        return format_duration(value)
    if name in AMOUNTS:
        return f"{value:,.0f}" if value < 10**6 else format_count(value)
    return f"{value:.4f}" if name.startswith(TASKS) else format_number(value)


def _measures(record: RunRecord) -> Iterator[tuple[str, Any]]:
    summary, setup = record.summary, record.setup
    held_out = [row["loss"] for row in record.evals if row["step"] > 0 and _is_number(row["loss"])]
    last = summary.get("eval_loss_after", held_out[-1] if held_out else None)
    if _is_number(last):
        yield "eval_loss", last
        yield "best_eval_loss", min([*held_out, last])
        yield "perplexity", math.exp(last) if last < 700 else None
    losses = [row["loss"] for row in record.steps if _is_number(row.get("loss"))][-LAST_STEPS:]
    if losses:
        yield "train_loss", math.fsum(losses) / len(losses)
    speeds = [row["tokens_per_s"] for row in record.steps if _is_number(row.get("tokens_per_s"))]
    if speeds:
        yield "tokens_per_s", statistics.median(speeds)
    yield "train_s", summary.get("train_s")
    yield "wall_s", record.wall_s
    for name in ("peak_memory_bytes", "peak_host_bytes"):
        yield name, max(summary.get(name) or [], default=None)
    yield "steps", summary.get("steps", record.steps[-1]["step"] if record.steps else None)
    yield "trained_tokens", summary.get("trained_tokens")
    yield "num_trainable", setup.get("num_trainable")
    for evaluation in record.evaluations:  # oldest first
        yield from _of_tasks(evaluation)


def _of_tasks(evaluation: Row) -> Iterator[tuple[str, Any]]:
    """Yields metrics of the trained model; how sure they are is no measure of it."""
    result: Row = evaluation["models"].get(TRAINED, {})
    tasks: Mapping[str, Row] = result.get("tasks", {})
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if "_stderr" not in metric:
                yield f"{TASKS}{task}.{metric.removesuffix(',none')}", value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
