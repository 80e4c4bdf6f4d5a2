"""The losses of a run as one SVG file that stands alone: a picture for a model card."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fsdpq.reports.charts import Chart, build_chart
from fsdpq.reports.run_record import Row

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 48
"""Pixels of the picture, and of its margins around the plot."""

STYLE = """\
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #5a6675; }
.title { font-size: 15px; font-weight: 600; fill: #1b2430; }
.back { fill: #fff; } .grid { stroke: #e9ecf0; }
path { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.training { stroke: #2f6fde; } .held-out { stroke: #d9600a; stroke-dasharray: 5 4; }
circle.training { fill: #2f6fde; } circle.held-out { fill: #d9600a; stroke-dasharray: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa7b7; } .title { fill: #e6eaf0; }
  .back { fill: #1b2129; } .grid { stroke: #2a323d; }
}"""


def draw_losses(steps: Sequence[Row], evals: Sequence[Row]) -> str:
    """Returns an SVG of training and held-out loss by step, or an empty text without any.

    Args:
        steps: ``step`` rows of ``metrics.jsonl``.
        evals: its ``eval`` rows.
    """
    series = {
        "training": _points(steps),
        "held out": _points(evals),
    }
    chart = build_chart("Loss", series, num_y_ticks=6)
    if not chart.curves:
        return ""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="{LEFT}" y="26">{escape(chart.title)}</text>',
        *_draw_axes(chart),
        *_draw_curves(chart),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]


def _x(percent: float) -> float:
    return LEFT + percent / 100 * (WIDTH - LEFT - RIGHT)


def _y(percent: float) -> float:
    return TOP + percent / 100 * (HEIGHT - TOP - BOTTOM)


def _draw_axes(chart: Chart) -> list[str]:
    lines: list[str] = []
    for tick in chart.y_ticks:
        y = _y(tick.position)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(tick.label)}</text>'
        )
    for tick in chart.x_ticks:
        x, y = _x(tick.position), HEIGHT - BOTTOM + 18
        lines.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(tick.label)}</text>')
    middle, below = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10
    return [*lines, f'<text x="{middle:.0f}" y="{below}" text-anchor="middle">step</text>']


def _draw_curves(chart: Chart) -> list[str]:
    lines: list[str] = []
    right = WIDTH - RIGHT
    for index, curve in enumerate(chart.curves):
        kind = curve.name.replace(" ", "-")
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        if curve.path:
            lines.append(
                f'<svg x="{LEFT}" y="{TOP}" width="{width}" height="{height}" '
                'viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible">'
                f'<path class="{kind}" d="{curve.path}"/></svg>'
            )
        lines += [
            f'<circle class="{kind}" cx="{_x(dot.x):.1f}" cy="{_y(dot.y):.1f}" r="3">'
            f"<title>{escape(dot.title)}</title></circle>"
            for dot in curve.dots
        ]
        left = right - 90 * (len(chart.curves) - index)
        lines.append(
            f'<path class="{kind}" d="M{left} 22h20"/>'
            f'<text x="{left + 26}" y="26">{escape(curve.name)}</text>'
        )
    return lines
