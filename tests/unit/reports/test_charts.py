"""Charts of several curves: what is drawn where, in which order, and on which axis."""

from __future__ import annotations

import math

import pytest

from fsdpq.reports.charts import NUM_COLOURS, NUM_DASHES, Series, build_chart, palette, smooth
from fsdpq.reports.ticks import log_scale


def test_curves_without_a_style_get_one_each_and_then_begin_again():
    styles = [palette(index) for index in range(NUM_COLOURS * NUM_DASHES)]
    assert len(set(styles)) == 24
    assert styles[0] == palette(24) == "c-0 d-0"
    assert styles[8] == "c-0 d-1"


def test_what_stands_out_is_drawn_last_and_the_legend_keeps_the_order():
    points = [(1.0, 2.0), (2.0, 1.0)]
    series = [
        Series("best", points, palette(0), "strong"),
        Series("other", points, palette(1)),
        Series("thin", points, palette(2), "faint"),
    ]
    chart = build_chart("Loss", series)
    assert [curve.name for curve in chart.curves] == ["thin", "other", "best"]
    assert [curve.name for curve in chart.legend] == ["best", "other", "thin"]
    assert [len(curve.dots) for curve in chart.legend] == [2, 2, 0]
    assert chart.legend[0].title == "best, step 2: 1"


def test_a_name_gives_a_class_that_is_one_class():
    chart = build_chart("Loss", {'held out" onload=x': [(1.0, 2.0)]})
    assert chart.curves[0].style == "s-held-out--onload-x"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_that_are_not_finite_are_left_out(bad):
    chart = build_chart("Loss", {"a": [(1, 1.0), (2, bad), (bad, 1.0), (3, 2.0)], "b": [(1, bad)]})
    assert [curve.path for curve in chart.curves] == ["M0.00 100.00L100.00 0.00"]


def test_a_logarithmic_axis_has_equal_factors_equally_far_apart():
    points = [(0, 0.001), (1, 0.01), (2, 0.1), (3, 1.0), (4, 0.0), (5, -1.0)]
    chart = build_chart("Loss", {"a": points}, log_y=True)
    assert chart.is_log
    assert [dot.y for dot in chart.curves[0].dots] == pytest.approx([100, 66.67, 33.33, 0])
    assert [tick.label for tick in chart.y_ticks] == ["0.001", "0.01", "0.1", "1"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.2, 4.0, [1, 2, 5]),
        (3.0, 30.0, [2, 5, 10, 20, 50]),
        (2.0, 2.0, [1, 2, 5]),
        (1e-8, 1e4, [1e-8, 1e-6, 1e-4, 1e-2, 1, 100, 1e4]),
        (3e-308, 1e308, None),
    ],
)
def test_marks_of_a_logarithmic_axis_are_round_and_enclose_the_values(low, high, expected):
    scale = log_scale(low, high)
    assert scale.low <= low < high <= scale.high or low == high
    assert 2 <= len(scale.values) <= 8
    if expected is not None:
        assert list(scale.values) == pytest.approx(expected)


def test_curves_of_different_lengths_share_their_axes():
    chart = build_chart("Loss", {"a": [(0, 0.0), (10, 10.0)], "b": [(5, 5.0), (20, 10.0)]})
    assert [dot.x for dot in chart.curves[1].dots] == [25, 100]
    assert [dot.y for dot in chart.curves[1].dots] == [50, 0]


def test_a_moving_mean_is_of_fewer_points_at_the_ends_and_keeps_a_line_a_line():
    line = [(float(x), 3.0 * x) for x in range(9)]
    assert [y for _, y in smooth(line, 5)] == pytest.approx([y for _, y in line])
    spike = [(float(x), 5.0 if x == 4 else 0.0) for x in range(9)]
    assert [y for _, y in smooth(spike, 5)] == pytest.approx([0, 0, 1, 1, 1, 1, 1, 0, 0])


def test_long_curves_are_averaged_to_the_wanted_number_of_points():
    points = [(float(step), float(step % 2)) for step in range(1000)]
    chart = build_chart("Loss", {"a": points, "b": points[:3]}, max_points=100, x_name="tokens")
    assert chart.group_size == 10
    assert chart.curves[0].path.count("L") == 99
    assert chart.curves[0].title == "a, tokens 999: 0.5"
    assert len(chart.curves[1].dots) == 3, "a short one keeps every point"
    assert not chart.all_averaged
