"""The page of a comparison: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fsdpq.pages.environment import page_environment
from fsdpq.reports.charts import Chart, Points, Series, build_chart, palette
from fsdpq.reports.comparison import MEASURES, ComparedRun
from fsdpq.reports.report import format_bytes, format_count, format_duration
from fsdpq.reports.run_record import Row, RunRecord
from fsdpq.reports.settings_rows import NOTHING, plain_text
from fsdpq.reports.ticks import format_number

TEMPLATE = "comparison.html.jinja"
MAX_POINTS = 80
"""A curve of single steps is averaged to so many points: several are read by their trend."""

FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: NOTHING if value is None else f"{value:.3f}",
    "count": format_count,
    "duration": format_duration,
    "bytes": format_bytes,
}


def render_comparison(
    content: dict[str, Any], runs: Sequence[ComparedRun], *, links: Sequence[str]
) -> str:
    """Returns the page of ``content`` (see `fsdpq.reports.comparison.comparison_content`).

    Args:
        content: what is compared.
        runs: the same runs, in the same order.
        links: address of each run's own report from where the page will lie; empty for none.
    """
    filters: dict[str, Callable[[Any], str]] = {"text": plain_text, "number": format_number}
    environment = page_environment(Path(__file__).parent, filters=filters)
    records = [run.record for run in runs]
    labels = [run.label for run in runs]
    return environment.get_template(TEMPLATE).render(
        **content,
        styles=[palette(index) for index in range(len(runs))],
        links=links,
        measures=MEASURES,
        cells=[
            [FORMATS[measure.sort](run["headline"].get(measure.name)) for measure in MEASURES]
            for run in content["runs"]
        ],
        loss_charts=_loss_charts(labels, records),
        small_charts=_small_charts(labels, records),
    )


def count_tokens(record: RunRecord) -> dict[int, int]:
    """Returns step -> tokens that carried loss up to it, 0 at the start, of the logged steps."""
    rows = record.steps
    sums = accumulate(int(row.get("trained_tokens") or 0) for row in rows)
    return {0: 0} | {row["step"]: total for row, total in zip(rows, sums, strict=True)}


def _loss_charts(labels: Sequence[str], records: Sequence[RunRecord]) -> list[Chart]:
    """By step; held-out losses by tokens too, where a step has more of them in one run."""
    charts = [
        build_chart("Held-out loss", _series(labels, [_points(r.evals) for r in records])),
        build_chart(
            "Training loss",
            _series(labels, [_points(r.steps) for r in records]),
            max_points=MAX_POINTS,
        ),
    ]
    tables = [count_tokens(record) for record in records]
    sizes = {round(max(table.values()) / max(table), 1) for table in tables if max(table)}
    if len(sizes) > 1:
        points = [_by_tokens(r.evals, table) for r, table in zip(records, tables, strict=True)]
        title = "Held-out loss by tokens"
        charts.append(build_chart(title, _series(labels, points), x_name="trained tokens"))
    return [chart for chart in charts if chart.curves] or charts[:1]


def _small_charts(labels: Sequence[str], records: Sequence[RunRecord]) -> list[Chart]:
    titles = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "tokens_per_s": "Tokens per second",
    }
    return [
        build_chart(
            title,
            _series(labels, [_points(record.steps, key) for record in records]),
            y_from_zero=True, num_y_ticks=3, max_points=MAX_POINTS,
        )
        for key, title in titles.items()
    ]  # fmt: skip


def _series(labels: Sequence[str], points: Sequence[Points]) -> list[Series]:
    return [
        Series(label, of_run, palette(index))
        for index, (label, of_run) in enumerate(zip(labels, points, strict=True))
    ]


def _points(rows: Sequence[Row], key: str = "loss") -> Points:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _by_tokens(evals: Sequence[Row], table: dict[int, int]) -> Points:
    """Held-out losses by the tokens of the last step that was logged before."""
    return [
        (table[max(known for known in table if known <= step)], loss)
        for step, loss in _points(evals)
        if step >= 0
    ]
