"""The plot of the documentation: a line chart as SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

from fsdpq.metrics.charts import Points, build_chart

WIDTH, HEIGHT = 720, 380
LEFT, TOP, RIGHT, BOTTOM = 70, 44, 190, 46
COLORS = ("#2f6fde", "#d9730d", "#2a9d5c", "#c2385a", "#7a52cc")
INK, GRID = "#6b7280", "#9ca3af55"


def draw(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """Returns the SVG; ``series`` maps names to points."""
    chart = build_chart(title, series, y_from_zero=True, num_y_ticks=6)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(percent: float) -> float:
        return round(LEFT + width * percent / 100, 1)

    def y_of(percent: float) -> float:
        return round(TOP + height * percent / 100, 1)

    style = f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="22" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for tick in chart.y_ticks:
        y = y_of(tick.position)
        parts.append(f'<path d="M{LEFT} {y}H{LEFT + width}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick.label}</text>')
    for tick in chart.x_ticks:
        x = x_of(tick.position)
        parts.append(f'<text x="{x}" y="{HEIGHT - 28}" text-anchor="middle">{tick.label}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 6}">{escape(y_label)}</text>')
    ends: list[float] = []
    for curve, color in zip(chart.curves, COLORS, strict=False):
        dots = [(x_of(dot.x), y_of(dot.y)) for dot in curve.dots]
        path = "M" + "L".join(f"{x} {y}" for x, y in dots)
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in dots]
        x, y = dots[-1]
        while any(abs(y - other) < 14 for other in ends):
            y += 2  # labels must not touch
        ends.append(y)
        parts.append(f'<text x="{x + 8}" y="{y + 4}" fill="{color}">{escape(curve.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
