"""Geometry of the report's line charts: ticks, paths and points, in percent of the plot.

The template draws them: curves as inline SVG stretched to the page (strokes keep their width), and
labels as HTML beside it, so that text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_POINTS = 800
"""More points than this are averaged in equal groups: finer than a screen shows."""

MAX_DOTS = 40
"""A curve of at most so many points shows each as a dot."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where (percent from left or from the top) and what it says."""

    position: float
    label: str


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
    """

    name: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart; no curves means no data.

    Attributes:
        title: heading.
        curves: one per series that has points.
        x_ticks: marks along the bottom.
        y_ticks: marks along the left.
        group_size: how many measurements one drawn point averages.
        marks: places along the bottom that a line stands at.
    """

    title: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    group_size: int
    marks: tuple[Tick, ...] = ()


def build_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    y_from_zero: bool = False,
    num_y_ticks: int = 5,
    marks: Mapping[float, str] | None = None,
) -> Chart:
    """Returns the geometry of a chart of ``series`` (name -> points), non-finite points left out.

    Args:
        title: heading.
        series: name -> ``(step, value)`` in the order of steps.
        y_from_zero: the vertical axis starts at 0.
        num_y_ticks: about how many marks the vertical axis gets.
        marks: step -> what a line there means; those beside the measurements are left out.
    """
    clean = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    group_size = max((math.ceil(len(points) / MAX_POINTS) for points in clean.values()), default=1)
    kept = {name: _average(points, group_size) for name, points in clean.items() if points}
    if not kept:
        return Chart(title, (), (), (), 1)
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y_values = tick_values(0.0 if y_from_zero else min(ys), max(ys), num_y_ticks)
    y_range = (y_values[0], y_values[-1])
    x_values = [
        x
        for x in tick_values(x_range[0], x_range[1], 6)
        if x_range[0] <= x <= x_range[1] and x == round(x)
    ]
    return Chart(
        title=title,
        curves=tuple(_curve(name, points, x_range, y_range) for name, points in kept.items()),
        x_ticks=tuple(Tick(_percent(x, x_range), format_number(x)) for x in x_values),
        y_ticks=tuple(Tick(100 - _percent(y, y_range), format_number(y)) for y in y_values),
        group_size=max(1, group_size),
        marks=tuple(
            Tick(round(_percent(x, x_range), 2), text)
            for x, text in (marks or {}).items()
            if x_range[0] <= x <= x_range[1]
        ),
    )


def tick_values(low: float, high: float, count: int) -> list[float]:
    """Returns round values (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """Returns a short text: ``12k``, ``1.25``, ``5e-4``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _average(points: Points, group_size: int) -> Points:
    if group_size <= 1:
        return points
    groups = [points[start : start + group_size] for start in range(0, len(points), group_size)]
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def _curve(
    name: str, points: Points, x_range: tuple[float, float], y_range: tuple[float, float]
) -> Curve:
    places = [(_percent(x, x_range), 100 - _percent(y, y_range)) for x, y in points]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places) if len(places) > 1 else ""
    dots = tuple(
        Dot(round(place[0], 2), round(place[1], 2), f"step {point[0]:.0f}: {point[1]:.5g}")
        for place, point in zip(places, points, strict=True)
    )
    return Curve(name, path, dots if len(dots) <= MAX_DOTS else ())


def _percent(value: float, bounds: tuple[float, float]) -> float:
    return 100 * (value - bounds[0]) / (bounds[1] - bounds[0])
