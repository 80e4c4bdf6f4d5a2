"""Packing loses nothing, doubles nothing, fills its sequences, and marks where documents begin."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import random_rows

from fsdpq.data.dealing.collate import collate
from fsdpq.data.pack import fill_rate, pack_lengths, pack_rows
from fsdpq.data.text.tokenize import Row


def _documents(packed: list[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = []
    for row in packed:
        assert sum(row.document_lengths) == len(row.input_ids) == len(row.loss_mask)
        start = 0
        for length in row.document_lengths:
            kept = slice(start, start + length)
            found.append((tuple(row.input_ids[kept]), tuple(map(int, row.loss_mask[kept]))))
            start += length
    return found


def _rows(lengths: list[int]) -> list[Row]:
    return [
        Row(np.full(n, index, dtype=np.int32), (np.arange(n) > 0).astype(np.uint8))
        for index, n in enumerate(lengths)
    ]


def _plain_best_fit(lengths: list[int], seq_len: int) -> int:
    """Returns the sequences of best fit decreasing, row by row."""
    rooms: list[int] = []
    opened = 0
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        opened += not fitting
        room = min(fitting, default=seq_len)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return opened


def _plain_first_fit(lengths: list[int], seq_len: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if place == len(rooms):
            rooms.append(seq_len)
        rooms[place] -= length
    return len(rooms)


def _log_normal(rows: int, median: float, spread: float, seq_len: int) -> npt.NDArray[np.int64]:
    logs = np.random.default_rng(0).normal(np.log(median), spread, rows)
    return np.clip(np.exp(logs), 8, seq_len).astype(np.int64)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 48).flatmap(
    lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=80))
))  # fmt: skip
def test_lengths_are_dealt_as_best_fit_decreasing_does_row_by_row(
    case: tuple[int, list[int]],
) -> None:
    seq_len, lengths = case
    sequences = pack_lengths(np.array(lengths, dtype=np.int64), seq_len)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert all(0 < size <= seq_len for size in sizes)
    assert len(sequences) == _plain_best_fit(lengths, seq_len)
    # No two sequences could be joined: at most one is filled by half or less.
    assert sum(2 * size <= seq_len for size in sizes) <= 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packing_is_a_permutation_of_the_rows(lengths: list[int]) -> None:
    rows = _rows(lengths)
    packed = pack_rows(rows, 40)
    expected = Counter((tuple(r.input_ids), tuple(map(int, r.loss_mask))) for r in rows)
    assert Counter(_documents(packed)) == expected
    assert sum(row.num_trained for row in packed) == sum(row.num_trained for row in rows)
    assert pack_rows(rows, 40) == packed


def test_each_row_goes_where_it_leaves_the_least_room() -> None:
    packed = pack_rows(_rows([2, 6, 5, 3, 4]), 10)
    assert [row.document_lengths for row in packed] == [(6, 4), (2, 5, 3)]


# Median and spread of the logarithm, about those of alpaca, dolly and guanaco
@pytest.mark.parametrize("seq_len", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("spread", [(90, 0.8), (130, 1.0), (420, 0.85)])
def test_real_length_distributions_fill_98_percent(
    spread: tuple[float, float], seq_len: int
) -> None:
    lengths = _log_normal(20_000, *spread, seq_len)
    sequences = pack_lengths(lengths, seq_len)
    assert lengths.sum() > 0.98 * seq_len * len(sequences)
    some = lengths[:1500]
    first_fit = _plain_first_fit(some.tolist(), seq_len)
    assert len(pack_lengths(some, seq_len)) <= first_fit


def test_trl_makes_as_many_sequences() -> None:
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    for median, spread in [(90, 0.8), (420, 0.85)]:
        lengths = _log_normal(3000, median, spread, 512)
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]})
        # By default it packs every thousand rows by themselves, into a few more.
        theirs = trl.pack_dataset(rows, 512, "bfd", {"batch_size": len(rows)})
        assert len(pack_lengths(lengths, 512)) == len(theirs)


def test_neither_the_order_of_sequences_nor_that_in_them_is_by_length() -> None:
    lengths = _log_normal(20_000, 130, 1.0, 1024)
    sequences = pack_lengths(lengths, 1024)
    assert all((np.diff(sequence) > 0).all() for sequence in sequences)
    documents = np.array([len(sequence) for sequence in sequences])
    longest = np.array([lengths[sequence].max() for sequence in sequences])
    place = np.arange(documents.size)
    # Of some 4000 numbers in no order: 0.05 is three standard deviations. Without the order that
    # rows of one length are given it is -0.12 for the longest.
    assert abs(np.corrcoef(place, documents)[0, 1]) < 0.05
    assert abs(np.corrcoef(place, longest)[0, 1]) < 0.05
    begin = np.array([sequence.mean() for sequence in sequences])
    assert np.corrcoef(place, begin)[0, 1] > 0.5, "and yet they follow the data"


def test_many_rows_are_packed_within_a_second() -> None:
    lengths = _log_normal(200_000, 420, 0.85, 4096)
    start = time.process_time()
    pack_lengths(lengths, 4096)
    assert time.process_time() - start < 2  # 0.1 s where nothing else runs


def test_the_fill_rate_is_the_share_of_tokens() -> None:
    packed = pack_rows(_rows([6, 5, 4, 3, 2, 9]), 10)
    assert fill_rate(packed, 10) == pytest.approx(29 / 30)


def test_a_row_that_does_not_fit_is_an_error() -> None:
    for length in (9, 0):
        with pytest.raises(ValueError, match=f"a row of {length} tokens does not fit into 8"):
            pack_lengths(np.array([3, length, 8]), 8)


def test_positions_restart_at_every_document_and_at_the_padding() -> None:
    rows = [*pack_rows(_rows([4, 3]), 8), Row(np.full(9, 9, np.int32), np.zeros(9, np.uint8))]
    batch = collate(rows)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1], list(range(9))]
    assert batch.to(torch.device("cpu")).position_ids is not None


def test_no_target_crosses_into_the_next_document() -> None:
    batch = collate(pack_rows(_rows([4, 3]), 8))
    assert batch.loss_positions.tolist() == [0, 1, 2, 4, 5]
    assert batch.targets.tolist() == [0, 0, 0, 1, 1]


def test_rows_that_are_not_packed_have_no_positions() -> None:
    assert collate(random_rows(3)).position_ids is None
