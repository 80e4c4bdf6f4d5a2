"""Several runs on one page: their curves in one chart, and what differs between them.

From the files in their directories alone, as the report of one run; runs that have not finished, or
failed, are compared as far as they came. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.reports.report import report_content
from fsdpq.reports.run_record import Row, RunRecord
from fsdpq.reports.settings_rows import flatten

COMPARISON_FORMAT = 1

KEPT = (
    "name",
    "run",
    "description",
    "model",
    "status",
    "state",
    "error",
    "headline",
    "setup",
    "missing",
)
"""Fields of a run's report that a comparison repeats."""


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs.

    Attributes:
        label: what tells it from the others.
        path: its directory as the user named it.
        record: what its files say.
        state: how it stands, where it has not finished (`fsdpq.reports.report.report_content`).
    """

    label: str
    path: str
    record: RunRecord
    state: str | None = None


@dataclass(frozen=True)
class Measure:
    """A column of the table of numbers.

    Attributes:
        name: of a run's ``headline``.
        title: heading.
        sort: how it is written: ``loss``, ``number``, ``count``, ``duration`` or ``bytes``.
        best: which of several is marked.
    """

    name: str
    title: str
    sort: str
    best: str = ""


MEASURES = (
    Measure("eval_loss_before", "held out before", "loss"),
    Measure("eval_loss_after", "held out after", "loss", "lowest"),
    Measure("best_eval_loss", "lowest", "loss", "lowest"),
    Measure("train_loss", "training", "loss"),
    Measure("steps", "steps", "count"),
    Measure("trained_tokens", "trained tokens", "count"),
    Measure("num_trainable", "trainable", "count"),
    Measure("median_tokens_per_s", "tokens/s", "count", "highest"),
    Measure("train_s", "time", "duration"),
    Measure("peak_memory_bytes", "peak memory", "bytes", "lowest"),
)


def comparison_content(runs: Sequence[ComparedRun], environment: Sequence[Row]) -> dict[str, Any]:
    """Returns a comparison as JSON data; the page shows the same.

    Args:
        runs: in the order of the page.
        environment: what differs between their machines and versions: ``what``, ``level``, and
            ``values`` as text, one a run.

    Returns:
        ``runs``; ``settings``, ``environment`` and ``samples``, where lists are in the order of
        the runs; ``best``, the place of the best run of a measure.
    """
    reports = [report_content(run.record, name=run.label, state=run.state) for run in runs]
    shown: list[Row] = [
        {"label": run.label, "path": run.path} | {key: report[key] for key in KEPT}
        for run, report in zip(runs, reports, strict=True)
    ]
    settings, num_same = compare_settings([run.record for run in runs])
    return {
        "format": COMPARISON_FORMAT,
        "runs": shown,
        "best": {
            measure.name: place
            for measure in MEASURES
            if (place := _find_best(measure, [run["headline"] for run in shown])) is not None
        },
        "settings": settings,
        "num_same_settings": num_same,
        "environment": list(environment),
        "samples": _join_samples([run.record for run in runs]),
    }


def compare_settings(records: Sequence[RunRecord]) -> tuple[list[Row], int]:
    """Returns the keys of the recipes that differ, and how many are the same.

    Returns:
        Rows of ``key`` and ``sides``, one a run: ``present`` (a key of another kind is not there),
        ``value`` and ``source``, which is empty for a default and where the lock does not say.
    """
    tables = [flatten(record.settings) for record in records]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    places = [record.environment.get("provenance") for record in records]
    rows: list[Row] = []
    for key in keys:
        sides = [
            {
                "present": key in table,
                "value": table.get(key),
                "source": str(known.get(key, "")) if isinstance(known, dict) else "",
            }
            for table, known in zip(tables, places, strict=True)
        ]
        first = sides[0]
        if any((s["present"], s["value"]) != (first["present"], first["value"]) for s in sides):
            rows.append({"key": key, "sides": sides})
    order = {name: place for place, name in enumerate(_sections(records))}
    rows.sort(key=lambda row: order[row["key"].partition(".")[0]])
    return rows, len(keys) - len(rows)


def _sections(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(str(name) for record in records for name in record.settings))


def _find_best(measure: Measure, headlines: Sequence[Row]) -> int | None:
    """Returns which run is best, None where that says nothing."""
    known = {
        place: headline[measure.name]
        for place, headline in enumerate(headlines)
        if headline.get(measure.name) is not None
    }
    if not measure.best or len(set(known.values())) < 2:
        return None
    choose = min if measure.best == "lowest" else max
    return choose(known, key=lambda place: known[place])


def _join_samples(records: Sequence[RunRecord]) -> list[Row]:
    """Returns every prompt with the answers of all runs; one before, where all have the same."""
    tables = [{sample["prompt"]: sample for sample in record.samples} for record in records]
    prompts = dict.fromkeys(prompt for table in tables for prompt in table)
    return [
        {
            "prompt": prompt,
            "before": [table.get(prompt, {}).get("before") for table in tables],
            "after": [table.get(prompt, {}).get("after") for table in tables],
        }
        for prompt in prompts
    ]
