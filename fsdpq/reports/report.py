"""Writes the report of a run: ``report.html`` for people, ``report.json`` for scripts.

Both come from the files in the run directory alone, so a report can be made again at any time, also
of a run that failed. The page is one file that loads nothing and runs nothing; samples and recipe
text are untrusted and escaped. Torch-free.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdpq.pages.environment import page_environment
from fsdpq.reports.charts import Chart, Series, build_chart, smooth
from fsdpq.reports.plan_against_actual import Actual, compare_with_plan
from fsdpq.reports.run_record import Row, RunRecord, read_record
from fsdpq.reports.run_shapes import fit_data
from fsdpq.reports.settings_rows import (
    NOTHING,
    list_environment,
    list_sections,
    list_written,
    summarize_environment,
)
from fsdpq.reports.ticks import format_number
from fsdpq.rows.report import DataReport
from fsdpq.run_files import amounts
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

REPORT_FORMAT = 1
TEMPLATE = "report.html.jinja"

MANY = 150
"""From so many logged steps on, single losses stand back behind their moving mean."""

FAR = 50
"""A small chart whose highest value is so many times its median has a logarithmic axis."""


def write_report(files: RunFiles, *, state: str | None = None) -> None:
    """Writes ``report.html`` and ``report.json`` into the run directory, each at once or not.

    An unfinished run gets a report too; what is missing is shown as missing.

    Ranks: 0 only

    Args:
        files: the run directory.
        state: see `report_content`.

    Raises:
        OSError: the directory cannot be written.
    """
    record = read_record(files)
    content = report_content(record, name=files.root.absolute().name, state=state)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_whole(files.report_json, (text + "\n").encode())
    write_whole(files.report_html, render_html(content).encode())


def find_drift(files: RunFiles) -> str | None:
    """Returns one line about memory that was far from the plan, None where it was not."""
    record = read_record(files)
    compared = compare_with_plan(record.plan, _actual(record))
    return None if compared is None else compared["drift"]


def report_content(record: RunRecord, *, name: str, state: str | None = None) -> dict[str, Any]:
    """Returns the content of ``report.json``; the page shows the same numbers.

    Args:
        record: what the run directory says.
        name: name of the run directory, for a run without a recipe.
        state: how a run that has not finished stands now, where somebody looked: ``running``.
    """
    return {
        "format": REPORT_FORMAT,
        "name": record.settings.get("name", name),
        "run": name,
        "description": record.settings.get("description", ""),
        "model": record.setup.get("model") or _recipe_model(record.settings),
        "status": record.status,
        "state": state if record.status == "unfinished" else None,
        "error": record.error,
        "headline": _headline(record),
        "data": _data(record.environment),
        "setup": record.setup,
        "summary": record.summary,
        "memory": _memory(record),
        "memory_phases": _most_of_each_phase(record.memory),
        "plan_against_actual": _compare_with_plan(record),
        "samples": record.samples,
        "notices": record.notices,
        "export": record.export,
        "resumes": record.resumes,
        "steps": record.steps,
        "evals": record.evals,
        "evaluations": [_evaluation(row) for row in record.evaluations],
        "settings": record.settings,
        "provenance": _provenance(record.environment),
        "environment": record.environment,
        "missing": record.missing,
    }


def render_html(content: dict[str, Any]) -> str:
    """Returns the page for ``content`` (see `report_content`)."""
    filters = {
        "bytes": format_bytes,
        "duration": format_duration,
        "number": format_number,
        "count": format_count,
    }
    pages = page_environment(Path(__file__).parent, filters=filters)
    settings, environment = content["settings"], content["environment"]
    return pages.get_template(TEMPLATE).render(
        **content,
        setup_words=_setup_words(content["setup"]),
        loss_chart=_loss_chart(content),
        small_charts=_small_charts(content["steps"]),
        settings_sections=list_sections(settings),
        written=list_written(settings, content["provenance"] or {}),
        environment_words=summarize_environment(environment),
        environment_rows=list_environment(environment),
        memory_scale=max((_rank_total(row) for row in content["memory"]), default=0) or 1,
    )


def format_bytes(num_bytes: float | None) -> str:
    """Returns memory for people; a dash for None."""
    return NOTHING if num_bytes is None else amounts.format_bytes(num_bytes)


def format_duration(seconds: float | None) -> str:
    """Returns a duration for people; a dash for None."""
    return NOTHING if seconds is None else amounts.format_duration(seconds)


def _headline(record: RunRecord) -> dict[str, Any]:
    """The numbers that a reader wants first; None for what the run does not say."""
    setup, summary, evals = record.setup, record.summary, record.evals
    after = summary.get("eval_loss_after")
    before = summary.get("eval_loss_before")
    if not summary and evals:
        before = evals[0].get("loss")
        after = evals[-1].get("loss") if len(evals) > 1 else None
    speeds = [row["tokens_per_s"] for row in record.steps if row.get("tokens_per_s")]
    last = record.steps[-1] if record.steps else {}
    peaks = summary.get("peak_memory_bytes") or []
    return {
        "eval_loss_before": before,
        "eval_loss_after": after,
        **_best(evals),
        "perplexity_before": _perplexity(before),
        "perplexity_after": _perplexity(after),
        "last_train_loss": last.get("loss"),
        "train_loss": _mean_of_last(record.steps),
        "steps": summary.get("steps", last.get("step")),
        "total_steps": setup.get("total_steps", last.get("total_steps")),
        "train_s": summary.get("train_s"),
        "tokens": summary.get("tokens", _sum(record.steps, "tokens")),
        "trained_tokens": summary.get("trained_tokens", _sum(record.steps, "trained_tokens")),
        "median_tokens_per_s": statistics.median(speeds) if speeds else None,
        "num_parameters": setup.get("num_parameters"),
        "num_trainable": setup.get("num_trainable"),
        "world_size": setup.get("world_size"),
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def _best(evals: list[Row]) -> Row:
    """The lowest held-out loss and its step, the first one where several are equal."""
    known = [row for row in evals if row.get("loss") is not None]
    best = min(known, key=lambda row: row["loss"], default={})
    return {"best_eval_loss": best.get("loss"), "best_eval_step": best.get("step")}


def _sum(steps: list[Row], key: str) -> int | None:
    """What a run that has not finished logged so far; None where it logged nothing."""
    found = [row[key] for row in steps if isinstance(row.get(key), int)]
    return sum(found) if found else None


def _mean_of_last(steps: list[Row], count: int = 10) -> float | None:
    losses = [row["loss"] for row in steps[-count:] if row.get("loss") is not None]
    return statistics.fmean(losses) if losses else None


def _evaluation(row: Row) -> Row:
    """Returns a record of `fsdpq.run_files.evaluation_job` for the page: one row a number."""
    numbers: list[Row] = []
    for model, result in row["models"].items():
        if result.get("loss") is not None:
            numbers.append({"model": model, "what": "loss", "value": result["loss"]})
            numbers.append({"model": model, "what": "perplexity", "value": result["perplexity"]})
        for task, metrics in (result.get("tasks") or {}).items():
            numbers += [
                {"model": model, "what": f"{task}: {name.removesuffix(',none')}", "value": value}
                for name, value in metrics.items()
            ]
    known = [number for number in numbers if number["value"] is not None]
    return {**row, "numbers": known}


def _data(environment: Row) -> Row | None:
    """What became of the rows (`fsdpq.rows.report.DataReport`), None where the lock has none."""
    found: Any = environment
    for key in ("inputs", "prepared", "report"):
        found = found.get(key) if isinstance(found, dict) else None
    try:
        return None if found is None else fit_data(DataReport.from_json(found).as_json())
    except (TypeError, KeyError, AttributeError):
        return None


def _provenance(environment: Row) -> dict[str, str] | None:
    """Where the recipe's values were written, None where the lock does not say."""
    found = environment.get("provenance")
    return {key: str(place) for key, place in found.items()} if isinstance(found, dict) else None


def _compare_with_plan(record: RunRecord) -> Row | None:
    """The plan is fsdpq's own: one that is damaged, or a stranger's, cannot be compared."""
    try:
        compared = compare_with_plan(record.plan, _actual(record))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        record.missing.append("plan.json cannot be compared")
        return None
    return compared


def _recipe_model(settings: Row) -> str | None:
    model = settings.get("model")
    return model.get("name_or_path") if isinstance(model, dict) else None


def _setup_words(setup: Row) -> list[str]:
    """On what the run ran: ranks, device, dtype; what is not known is left out."""
    ranks, device = setup.get("world_size"), setup.get("device")
    words = [f"{ranks} rank{'' if ranks == 1 else 's'}"] if ranks else []
    return words + [str(word) for word in (device, setup.get("dtype")) if word]


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _memory(record: RunRecord) -> list[Row]:
    """One row per rank: resident frozen and trained weights, and the measured peak."""
    base = record.setup.get("base_bytes_per_rank") or []
    adapter = record.setup.get("adapter_bytes_per_rank") or []
    peak = record.summary.get("peak_memory_bytes") or []
    return [
        {
            "rank": rank,
            "base_bytes": base[rank] if rank < len(base) else None,
            "adapter_bytes": adapter[rank] if rank < len(adapter) else None,
            "peak_bytes": peak[rank] if rank < len(peak) else None,
        }
        for rank in range(max(len(base), len(adapter), len(peak)))
    ]


def _most_of_each_phase(rows: list[Row]) -> list[Row]:
    """Returns one row a phase, in order: of micro-batches and steps the one with the highest."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        sizes = (row.get("peak_bytes") or 0, row["bytes"])
        found[row["phase"]] = max(sizes, found.get(row["phase"], sizes))
    return [
        {"phase": name, "bytes": now, "peak_bytes": most} for name, (most, now) in found.items()
    ]


def _actual(record: RunRecord) -> Actual:
    return Actual(record.memory, record.held, record.summary.get("peak_host_bytes") or [])


def _rank_total(row: Row) -> float:
    resident = (row["base_bytes"] or 0) + (row["adapter_bytes"] or 0)
    return max(resident, row["peak_bytes"] or 0)


def _points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def _loss_chart(content: dict[str, Any]) -> Chart:
    losses, marks = _points(content["steps"], "loss"), _resume_marks(content["resumes"])
    held_out = Series("held out", _points(content["evals"], "loss"))
    series = [Series("training", losses)]
    if len(losses) >= MANY:
        window = len(losses) // 50 // 2 * 2 + 1
        series = [
            Series("training", losses, "s-training raw"),
            Series(f"mean of {window} around", smooth(losses, window), "s-training", "strong"),
        ]
        held_out = replace(held_out, emphasis="strong")
    return build_chart("Loss", [*series, held_out], num_y_ticks=6, marks=marks)


def _resume_marks(resumes: list[Row]) -> dict[float, str]:
    """Where the run went on, by step; several times at one step are one mark."""
    marks: dict[float, str] = {}
    for row in resumes:
        ranks = row.get("world_size")
        who = f", saved by {ranks} rank{'' if ranks == 1 else 's'}" if ranks else ""
        marks[row["step"]] = f"went on from step {row['step']}{who}"
    return marks


def _small_charts(steps: list[Row]) -> list[Chart]:
    titles = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "tokens_per_s": "Tokens per second",
    }
    if any("aux_loss" in row for row in steps):
        titles["aux_loss"] = "Load-balancing loss"
    if any("loss_scale" in row for row in steps):
        titles["loss_scale"] = "Loss scale"
    return [_small_chart(title, _points(steps, key)) for key, title in titles.items()]


def _small_chart(title: str, points: list[tuple[float, float]]) -> Chart:
    """From zero up; logarithmic where one value would press all others flat."""
    above = sorted(value for _, value in points if value > 0)
    far = bool(above) and title != "Learning rate" and above[-1] > FAR * above[len(above) // 2]
    return build_chart(title, {title: points}, y_from_zero=not far, num_y_ticks=3, log_y=far)


def format_count(value: float | None) -> str:
    """Returns a count: exact with separators below a million, ``134.5M`` above, a dash for None."""
    if value is None:
        return NOTHING
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}"
