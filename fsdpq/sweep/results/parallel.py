"""Parallel coordinates: an upright axis a setting, one more for the goal, and a line a trial.

Positions are in percent of the plot, as in `fsdpq.reports.charts`: the template draws lines as an
SVG that is stretched, and labels as HTML beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.reports.ticks import Scale, Tick, linear_scale, log_scale
from fsdpq.sweep.results.leaderboard import setting_text, short_titles
from fsdpq.sweep.results.measures import format_measure
from fsdpq.sweep.results.results import Results, TrialResult

MOST_STEPS = 6
"""Numbers with no more values than this are spread evenly: they were chosen, not drawn."""

MOST_LABELS = 12
LOG_FROM = 20
"""An axis is logarithmic where its largest value is so many times its smallest."""

MARGIN = 4
"""Percent that the outermost values of a list keep from the ends of their axis."""


@dataclass(frozen=True)
class Axis:
    """One upright axis.

    Attributes:
        title: above it.
        key: the setting or measure.
        position: percent from the left.
        ticks: marks, in percent from the top.
        is_log: equal factors are equally far apart.
        is_goal: it is the goal's.
    """

    title: str
    key: str
    position: float
    ticks: tuple[Tick, ...]
    is_log: bool = False
    is_goal: bool = False


@dataclass(frozen=True)
class ParallelLine:
    """A trial across all axes: SVG path data in a 100 x 100 box."""

    trial: TrialResult
    path: str


@dataclass(frozen=True)
class Parallel:
    """The chart; no lines where fewer than two trials are ranked or nothing varies."""

    axes: tuple[Axis, ...]
    lines: tuple[ParallelLine, ...]


@dataclass(frozen=True)
class _Places:
    """Where the values of an axis stand: percent from the top, by trial."""

    heights: tuple[float, ...]
    ticks: tuple[Tick, ...]
    is_log: bool = False


def build_parallel(results: Results) -> Parallel:
    """Returns the axes of what varies and of the goal, and a line for every ranked trial."""
    trials = [trial for trial in results.trials if trial.rank is not None]
    keys = [k for k in results.varied if len({repr(t.settings.get(k)) for t in trials}) > 1]
    if len(trials) < 2 or not keys:
        return Parallel((), ())
    measure = results.goal.measure
    places = [_place([trial.settings.get(key) for trial in trials]) for key in keys]
    places.append(_place_goal(measure, [trial.measures[measure] for trial in trials]))
    titles = [*(short_titles(keys)[key] for key in keys), measure]
    lefts = [100 * index / (len(places) - 1) for index in range(len(places))]
    axes = tuple(
        Axis(title, key, left, place.ticks, place.is_log, left == 100)
        for title, key, left, place in zip(titles, [*keys, measure], lefts, places, strict=True)
    )
    lines = tuple(
        ParallelLine(trial, _path(lefts, [place.heights[index] for place in places]))
        for index, trial in enumerate(trials)
    )
    return Parallel(axes, lines)


def _path(lefts: Sequence[float], heights: Sequence[float]) -> str:
    points = zip(lefts, heights, strict=True)
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def _place(values: Sequence[Any]) -> _Places:
    distinct = {repr(value): value for value in values}
    if len(distinct) > MOST_STEPS and all(map(_is_number, values)):
        scale = _scale(values)
        ticks = tuple(Tick(100 - tick.position, tick.label) for tick in scale.ticks())
        return _Places(tuple(100 - scale.percent(v) for v in values), ticks, scale.is_log)
    order = list(distinct.values())
    if all(map(_is_number, order)):
        order.sort()
    gap = (100 - 2 * MARGIN) / max(1, len(order) - 1)
    heights = {repr(value): 100 - MARGIN - index * gap for index, value in enumerate(order)}
    every = -(-len(order) // MOST_LABELS)
    ticks = tuple(
        Tick(heights[repr(value)], setting_text(value) or "none") for value in order[::every]
    )
    return _Places(tuple(heights[repr(value)] for value in values), ticks)


def _place_goal(measure: str, values: Sequence[float]) -> _Places:
    scale = _scale(values)
    in_units = measure.endswith("_bytes") or measure in ("train_s", "wall_s")
    ticks = tuple(
        Tick(100 - tick.position, format_measure(measure, value) if in_units else tick.label)
        for tick, value in zip(scale.ticks(), scale.values, strict=True)
    )
    return _Places(tuple(100 - scale.percent(value) for value in values), ticks, scale.is_log)


def _scale(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high >= LOG_FROM * low:
        return log_scale(low, high)
    return linear_scale(low, high, 5)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
