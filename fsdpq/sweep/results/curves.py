"""The loss curves of a sweep over each other, coloured by how good the trials were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsdpq.reports.charts import Chart, Points, Series, build_chart
from fsdpq.reports.run_record import Row, read_measured
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.results.leaderboard import setting_text
from fsdpq.sweep.results.measures import format_measure
from fsdpq.sweep.results.results import Results, TrialResult

MOST_CURVES = 200
"""Of more trials the best are drawn."""

ALL_POINTS, LEAST_POINTS, MOST_POINTS = 12_000, 24, 240
"""Points of all curves together, so that a page of hundreds of trials stays small; of one curve."""

HEADROOM = 1.1
"""How far above where the trials started the axis goes; a loss that ran away is cut off there."""

NUM_GRADES = 7
"""Colours from the best trial to the worst, ``g-0`` to ``g-6`` of the page's style."""


@dataclass(frozen=True)
class Curves:
    """What is drawn.

    Attributes:
        charts: of held-out and training loss; one without measurements has no curves.
        num_drawn: trials that have a curve.
        num_left_out: trials that were trained and have none, as there are too many.
        ceilings: losses above this were cut off, by title of the chart; only where there are any.
    """

    charts: tuple[Chart, ...]
    num_drawn: int
    num_left_out: int
    ceilings: dict[str, float]


def draw_curves(files: SweepFiles, results: Results) -> Curves:
    """Returns the charts of the trials that were trained, finished or not.

    Args:
        files: the sweep directory.
        results: of the sweep.
    """
    trained = [t for t in results.trials if t.status not in ("skipped", "waiting")]
    drawn = trained[:MOST_CURVES]
    records = [read_measured(files.run(trial.id)) for trial in drawn]
    parts = {
        "Held-out loss": [_points(record.evals) for record in records],
        "Training loss": [_points(record.steps) for record in records],
    }
    max_points = min(MOST_POINTS, max(LEAST_POINTS, ALL_POINTS // max(1, len(drawn))))
    grades = grade_trials(results)
    charts: list[Chart] = []
    ceilings: dict[str, float] = {}
    for title, curves in parts.items():
        ceiling = HEADROOM * max((points[0][1] for points in curves if points), default=0.0)
        if any(y > ceiling for points in curves for _, y in points):
            ceilings[title] = ceiling
        series = [
            _series(results, trial, [p for p in points if p[1] <= ceiling], grades)
            for trial, points in zip(drawn, curves, strict=True)
        ]
        charts.append(build_chart(title, series, num_y_ticks=6, max_points=max_points))
    return Curves(tuple(charts), len(drawn), len(trained) - len(drawn), ceilings)


def grade_trials(results: Results) -> dict[str, int]:
    """Returns id -> colour of each ranked trial: 0 is the best, `NUM_GRADES` - 1 the worst."""
    ranked = [trial for trial in results.trials if trial.rank is not None]
    last = max(1, len(ranked) - 1)
    return {t.id: round(i * (NUM_GRADES - 1) / last) for i, t in enumerate(ranked)}


def describe_line(results: Results, trial: TrialResult) -> str:
    """Returns the tooltip of a trial's line."""
    return ", ".join(_describe(results, trial))


def _series(results: Results, trial: TrialResult, points: Points, grades: dict[str, int]) -> Series:
    name = describe_line(results, trial)
    if trial.id not in grades:
        return Series(name, points, style=f"t-{_place(results, trial)} unranked")
    style = f"t-{_place(results, trial)} g-{grades[trial.id]}"
    return Series(name, points, style, "strong" if trial.rank == 1 else "normal")


def _place(results: Results, trial: TrialResult) -> int:
    return results.trials.index(trial)


def _describe(results: Results, trial: TrialResult) -> Iterator[str]:
    yield f"#{trial.rank}" if trial.rank is not None else trial.status
    yield trial.id
    measure = results.goal.measure
    if measure in trial.measures:
        yield f"{measure} {format_measure(measure, trial.measures[measure])}"
    for key in results.varied:
        yield f"{key}={setting_text(trial.settings.get(key))}"


def _points(rows: Sequence[Row]) -> Points:
    return [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
