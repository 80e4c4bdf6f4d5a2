"""The order of rows: the same for ever, another in every epoch, even; and states as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsdpq.data.dealing.order import LoaderState, Position, check_resumable, epoch_order
from fsdpq.errors import CheckpointError


@given(
    num_rows=st.integers(0, 200),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(1, 10**6),
    window=st.integers(0, 10**6),
)
def test_an_epoch_has_every_row_once(num_rows: int, seed: int, epoch: int, window: int) -> None:
    order = epoch_order(num_rows, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(num_rows))


def test_the_order_is_that_of_every_release() -> None:
    # A checkpoint of an older version must go on with the rows that it had not seen.
    assert epoch_order(8, seed=1, epoch=2).tolist() == PINNED
    assert epoch_order(8, seed=2**62, epoch=1, window=3).tolist() == PINNED_WINDOW


PINNED = [5, 3, 6, 7, 1, 0, 2, 4]
PINNED_WINDOW = [7, 4, 5, 3, 1, 2, 6, 0]


def test_no_epoch_of_one_seed_has_the_order_of_another_seed() -> None:
    orders = [
        tuple(epoch_order(30, seed=seed, epoch=epoch, window=window).tolist())
        for seed in range(5)
        for epoch in range(1, 6)
        for window in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_every_row_comes_everywhere_equally_often() -> None:
    num_rows, num_epochs = 10, 4000
    orders = np.stack([epoch_order(num_rows, seed=3, epoch=e + 1) for e in range(num_epochs)])
    counts = np.stack([np.bincount(place, minlength=num_rows) for place in orders.T])
    # Chi-square of 10 x 10 cells with 81 degrees of freedom: above 145 once in 100,000 times.
    expected = num_epochs / num_rows
    assert ((counts - expected) ** 2 / expected).sum() < 145


def test_a_state_survives_json() -> None:
    state = LoaderState(3, 24, Position(2, 1, 5), seed=7, digest="abc")
    assert LoaderState.from_json(json.loads(json.dumps(state.as_json()))) == state


@pytest.mark.parametrize("damage", [{"position": None}, {"epoch": 3}, {"position": {"row": [1]}}])
def test_a_state_that_is_none_is_refused(damage: dict[str, object]) -> None:
    state = LoaderState(3, 24, Position(), seed=7, digest="abc").as_json()
    with pytest.raises(CheckpointError, match="no position in the training data"):
        LoaderState.from_json({**state, **damage})


def test_a_state_of_other_rows_or_another_seed_is_refused() -> None:
    own = LoaderState(0, 0, Position(), seed=7, digest="abc")
    check_resumable(LoaderState(3, 24, Position(2), seed=7, digest="abc"), own)
    with pytest.raises(CheckpointError, match="other training rows"):
        check_resumable(LoaderState(3, 24, Position(2), seed=7, digest="xyz"), own)
    with pytest.raises(CheckpointError, match=r"training\.seed: 8.*7") as caught:
        check_resumable(LoaderState(3, 24, Position(2), seed=8, digest="abc"), own)
    assert caught.value.hint == "use training.seed=8"
