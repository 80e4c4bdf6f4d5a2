"""Geometry of the pages' line charts: ticks, paths and points, in percent of the plot.

The template draws them: curves as inline SVG stretched to the page (strokes keep their width), and
labels as HTML beside it, so that text keeps its size on a phone. Colours and dashes are classes of
``style.css``, where they have values for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from fsdpq.reports.ticks import Scale, Tick, format_number, linear_scale, log_scale

MAX_POINTS = 800
"""More points than this are averaged in equal groups: finer than a screen shows."""

MAX_DOTS = 40
"""A curve of at most so many points shows each as a dot."""

NUM_COLOURS, NUM_DASHES = 8, 3
"""Of curves without a style of their own: so many colours, then the same with other dashes."""

Points = Sequence[tuple[float, float]]

Emphasis = Literal["normal", "strong", "faint"]
"""How a curve stands out among the others of its chart."""


@dataclass(frozen=True)
class Series:
    """What one curve shows.

    Attributes:
        name: for the legend and tooltips; may be untrusted.
        points: ``(x, y)`` in the order of x; those that are not finite are left out.
        style: CSS classes of its colour and dash (`palette`); empty takes the class of its name,
            ``s-held-out`` for ``held out``, which only the names of ``style.css`` have.
        emphasis: ``faint`` curves are thin and grey, and drawn first; ``strong`` ones are last.
    """

    name: str
    points: Points
    style: str = ""
    emphasis: Emphasis = "normal"


@dataclass(frozen=True)
class Dot:
    """A marked point, in percent from the left and from the top, and its tooltip."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: for the legend.
        path: SVG path data in a 100 x 100 box, empty for fewer than two points.
        dots: its marked points.
        style: CSS classes.
        emphasis: see `Series`.
        title: tooltip of the line: its name and its last point.
    """

    name: str
    path: str
    dots: tuple[Dot, ...]
    style: str = ""
    emphasis: Emphasis = "normal"
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart; no curves means no data.

    Attributes:
        title: heading.
        curves: one per series that has points, in the order in which they are drawn.
        x_ticks: marks along the bottom.
        y_ticks: marks along the left.
        group_size: how many measurements one drawn point of the longest curve averages.
        marks: places along the bottom that a line stands at.
        x_name: what the horizontal axis counts.
        is_log: the vertical axis is logarithmic.
        legend: its curves in the order in which they were given.
        all_averaged: a point of every curve averages as many.
    """

    title: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    group_size: int
    marks: tuple[Tick, ...] = ()
    x_name: str = "step"
    is_log: bool = False
    legend: tuple[Curve, ...] = ()
    all_averaged: bool = True


def palette(index: int) -> str:
    """Returns the CSS classes of curve ``index`` of several: its colour, and its dash.

    The first eight are told apart by colour, also by people who are colour-blind; after those the
    colours come again with other dashes, 24 in all.
    """
    return f"c-{index % NUM_COLOURS} d-{index // NUM_COLOURS % NUM_DASHES}"


def build_chart(
    title: str,
    series: Mapping[str, Points] | Sequence[Series],
    *,
    y_from_zero: bool = False,
    num_y_ticks: int = 5,
    marks: Mapping[float, str] | None = None,
    x_name: str = "step",
    log_y: bool = False,
    max_points: int = MAX_POINTS,
) -> Chart:
    """Returns the geometry of a chart of ``series``, points left out that are not finite.

    Args:
        title: heading.
        series: curves, or name -> points.
        y_from_zero: the vertical axis starts at 0.
        num_y_ticks: about how many marks the vertical axis gets.
        marks: step -> what a line there means; those beside the measurements are left out.
        x_name: what the horizontal axis counts, such as ``step`` or ``trained tokens``.
        log_y: the vertical axis is logarithmic; what is not above 0 is left out.
        max_points: a curve of more is averaged in equal groups.
    """
    given = _as_series(series)
    clean = {index: _drawable(entry.points, log_y) for index, entry in enumerate(given)}
    sizes = {index: math.ceil(len(points) / max_points) for index, points in clean.items()}
    kept = {index: _average(points, sizes[index]) for index, points in clean.items() if points}
    if not kept:
        return Chart(title, (), (), (), 1, x_name=x_name, is_log=log_y)
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_scale = linear_scale(min(xs), max(xs), 6, whole=True)
    if log_y:
        y_scale = log_scale(min(ys), max(ys))
    else:
        y_scale = linear_scale(0.0 if y_from_zero else min(ys), max(ys), num_y_ticks)
    curves = [_curve(given[index], kept[index], x_scale, y_scale, x_name) for index in kept]
    return Chart(
        title=title,
        curves=tuple(sorted(curves, key=lambda c: ("faint", "normal", "strong").index(c.emphasis))),
        x_ticks=tuple(x_scale.ticks()),
        y_ticks=tuple(Tick(100 - tick.position, tick.label) for tick in y_scale.ticks()),
        group_size=max(sizes[index] for index in kept),
        all_averaged=len({sizes[index] for index in kept}) == 1,
        marks=_marks(marks or {}, x_scale),
        x_name=x_name,
        is_log=log_y,
        legend=tuple(curves),
    )


def smooth(points: Points, window: int) -> Points:
    """Returns the mean around every point: of ``window`` points, of fewer at both ends.

    Args:
        points: in the order of x, finite.
        window: odd number of points.
    """
    sums = list(accumulate((y for _, y in points), initial=0.0))
    half = window // 2
    found: list[tuple[float, float]] = []
    for place, (x, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)
        first, end = place - reach, place + reach + 1
        found.append((x, (sums[end] - sums[first]) / (end - first)))
    return found


def _marks(marks: Mapping[float, str], scale: Scale) -> tuple[Tick, ...]:
    beside = {x: text for x, text in marks.items() if scale.low <= x <= scale.high}
    return tuple(Tick(round(scale.percent(x), 2), text) for x, text in beside.items())


def _as_series(series: Mapping[str, Points] | Sequence[Series]) -> list[Series]:
    if isinstance(series, Mapping):
        return [Series(name, points) for name, points in series.items()]
    return list(series)


def _drawable(points: Points, log_y: bool) -> Points:
    finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    return [p for p in finite if p[1] > 0] if log_y else finite


def _average(points: Points, group_size: int) -> Points:
    if group_size <= 1:
        return points
    groups = [points[start : start + group_size] for start in range(0, len(points), group_size)]
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def _curve(series: Series, points: Points, x_scale: Scale, y_scale: Scale, x_name: str) -> Curve:
    places = [(x_scale.percent(x), 100 - y_scale.percent(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places) if len(places) > 1 else ""
    texts = [f"{x_name} {_whole(x)}: {y:.5g}" for x, y in points]
    dots = tuple(
        Dot(round(x, 2), round(y, 2), text) for (x, y), text in zip(places, texts, strict=True)
    )
    return Curve(
        name=series.name,
        path=path,
        dots=dots if len(dots) <= MAX_DOTS and series.emphasis != "faint" else (),
        style=series.style
        or "s-" + "".join(c if c.isalnum() else "-" for c in series.name.lower()),
        emphasis=series.emphasis,
        title=f"{series.name}, {texts[-1]}",
    )


def _whole(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 10_000 else format_number(value)
