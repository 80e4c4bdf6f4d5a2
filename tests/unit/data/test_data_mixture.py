"""Mixtures: shares within one row, no row more often than another, the same rows every time."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsdpq.data.preparing.mixture import choose_rows, count_rows

PARTS = st.lists(
    st.tuples(
        st.integers(1, 10**7),
        st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.1, 0.2, 0.7, 3.0])),
    ),
    min_size=1,
    max_size=6,
)


@given(PARTS, st.sampled_from(["first_exhausted", "all_exhausted"]))
@settings(max_examples=300, deadline=None)
def test_shares_are_within_one_row(parts: list[tuple[int, float]], stopping: Any) -> None:
    sizes, weights = [size for size, _ in parts], [Fraction(repr(weight)) for _, weight in parts]
    counts = count_rows(sizes, [weight for _, weight in parts], stopping)
    used_up = [count == size for count, size in zip(counts, sizes, strict=True)]
    assert any(used_up)
    if stopping == "first_exhausted":
        assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    else:
        assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    # One length of an epoch gives all counts: that of a part that is used up without rounding.
    trios = zip(sizes, weights, used_up, strict=True)
    lengths = [size / weight for size, weight, is_up in trios if is_up]
    assert any(
        all(abs(length * weight - count) < 1 for count, weight in zip(counts, weights, strict=True))
        for length in lengths
    )


@pytest.mark.parametrize(
    ("stopping", "counts"),
    [("first_exhausted", [100, 200, 700]), ("all_exhausted", [1000, 2000, 7000])],
)
def test_tenths_are_tenths(stopping: Any, counts: list[int]) -> None:
    sizes = [1000, 200, 5000]  # 0.1, 0.2 and 0.7 are no exact floats
    found = count_rows(sizes, [0.1, 0.2, 0.7], stopping)
    assert found == counts


def test_counts_of_the_guide() -> None:
    assert count_rows([300, 50], [0.7, 0.3], "first_exhausted") == [116, 50]
    assert count_rows([300, 50], [0.7, 0.3], "all_exhausted") == [300, 129]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20, 21])
def test_rows_are_taken_equally_often(count: int) -> None:
    rows = np.arange(100, 107)
    chosen = choose_rows(rows, count, seed=3, part=0)
    assert len(chosen) == count
    times = Counter(chosen.tolist())
    assert set(times) <= set(rows.tolist())
    assert {times[row] for row in rows.tolist()} <= {count // 7, count // 7 + 1}
    assert np.array_equal(chosen, choose_rows(rows, count, seed=3, part=0))
    passes = [chosen[start : start + 7] for start in range(0, count, 7)]
    assert all(np.all(np.diff(each) > 0) for each in passes)  # in their own order, again and again


def test_seed_and_part_choose_rows() -> None:
    rows = np.arange(1000)
    first = choose_rows(rows, 500, seed=1, part=0)
    assert not np.array_equal(first, choose_rows(rows, 500, seed=2, part=0))
    assert not np.array_equal(first, choose_rows(rows, 500, seed=1, part=1))
    assert 200 < np.count_nonzero(first < 500) < 300
