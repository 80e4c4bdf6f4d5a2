"""The pictures of ``fsdpq bench``: PNG files by matplotlib, which the extra ``bench`` brings.

matplotlib is imported by nothing else, and only once there is something to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdpq.registry import is_installed
from fsdpq.run_files.bench_record import Plot

COLORS = ("#2f6fde", "#d9730d", "#2a9d5c", "#c2385a", "#7a52cc", "#6b7280")
SIZE_INCHES = (7.5, 4.2)
DPI = 130
MAX_UPRIGHT = 4
"""More groups of one bar than these lie on their side, so that their names can be read."""

INSTALL_HINT = "no pictures: `pip install 'fsdpq[bench]'` brings matplotlib"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return is_installed("matplotlib")


def draw_plots(plots: Sequence[Plot], directory: Path) -> list[Path]:
    """Draws what has anything to show and returns the files."""
    return [
        draw_plot(plot, directory / f"{plot.name}.png") for plot in plots if plot.lines or plot.bars
    ]


def draw_plot(plot: Plot, path: Path) -> Path:
    """Draws one picture and returns its file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no display
    axes: Any = figure.subplots()
    axes.set_title(plot.title, fontsize=11, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    names = list(plot.lines) or list(dict.fromkeys(n for bars in plot.bars.values() for n in bars))
    if plot.lines:
        _draw_lines(axes, plot)
    elif len(names) == 1 and len(plot.bars) > MAX_UPRIGHT:
        _draw_lying_bars(axes, plot, names[0])
    else:
        _draw_bars(axes, plot, names)
    if len(names) > 1:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _draw_lines(axes: Any, plot: Plot) -> None:
    for index, (name, points) in enumerate(plot.lines.items()):
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        width = 1.5 + 1.5 * (len(plot.lines) - 1 - index)  # equal lines show below each other
        axes.plot(
            xs, ys, "o-", color=_color(index), label=name, linewidth=width, markersize=width + 2
        )
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, plot: Plot, names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [
            (group + (index - (len(names) - 1) / 2) * width, bars[name])
            for group, bars in enumerate(plot.bars.values())
            if name in bars
        ]
        drawn = axes.bar(
            [place for place, _ in places], [height for _, height in places],
            0.92 * width, color=_color(index), label=name,
        )  # fmt: skip
        axes.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
    axes.set_xticks(range(len(plot.bars)), list(plot.bars), fontsize=9)
    axes.set_ylabel(plot.y_label)
    axes.margins(y=0.12)


def _draw_lying_bars(axes: Any, plot: Plot, name: str) -> None:
    groups = list(plot.bars)[::-1]
    drawn = axes.barh(groups, [plot.bars[group][name] for group in groups], color=COLORS[0])
    axes.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=3)
    axes.set_xlabel(plot.y_label)
    axes.tick_params(axis="y", labelsize=9)
    axes.margins(x=0.12)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]
