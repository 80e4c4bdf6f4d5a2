"""Optuna's sampler: the same points for the same seed and results, better ones for a goal."""

from __future__ import annotations

import sys

import pytest

from fsdpq.errors import MissingDependencyError
from fsdpq.sweep.running.optuna_sampler import OptunaSampler, Point, Result

SIZES = (3, None)


def value_of(point: Point) -> float:
    """Has its lowest value, 0, at the second choice and 0.3."""
    return abs(point[0] - 1) + (point[1] - 0.3) ** 2


def search(count: int, *, seed: int = 0, batch: int = 1, told: int | None = None) -> list[Point]:
    """Returns the points of a search of ``count``, of which the first ``told`` are told."""
    sampler = OptunaSampler(SIZES, seed=seed, maximize=False)
    points: list[Point] = []
    while len(points) < count:
        asked = [sampler.ask() for _ in range(min(batch, count - len(points)))]
        for number, point in enumerate(asked, start=len(points)):
            if told is None or number < told:
                sampler.tell(number, Result(value_of(point)))
        points += asked
    return points


def test_the_same_seed_and_results_give_the_same_points() -> None:
    whole = search(16)
    assert search(16) == whole
    assert search(16, seed=1) != whole
    assert search(12) == whole[:12], "what comes later changes nothing"
    assert search(16, batch=4) == search(16, batch=4)


def test_points_come_closer_to_the_goal_than_chance() -> None:
    points = search(40)
    assert all(point[0] in (0, 1, 2) and 0 <= point[1] <= 1 for point in points)
    late = [value_of(point) for point in points[20:]]
    # By chance two thirds are at least 1 away.
    assert sum(value < 0.5 for value in late) > len(late) * 2 / 3


def test_ended_and_failed_points_are_told_too() -> None:
    def next_after(last: Result) -> Point:
        sampler = OptunaSampler(SIZES, seed=0, maximize=True)
        for number in range(20):
            sampler.ask()
            sampler.tell(number, last if number == 19 else Result(float(number)))
        return sampler.ask()

    ended = next_after(Result(100.0, step=5))
    assert ended != next_after(Result(100.0)), "the best that came to its end is a better guide"
    assert next_after(Result(float("nan"))) == next_after(Result(None))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError) as caught:
        OptunaSampler(SIZES, seed=0, maximize=False)
    assert caught.value.hint == "pip install 'fsdpq[sweep]'"
