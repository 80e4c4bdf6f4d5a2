"""Packing loses nothing, doubles nothing, fills its sequences, and marks where documents begin."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import random_rows

from fsdpq.data.collate import collate
from fsdpq.data.pack import fill_rate, pack_rows
from fsdpq.data.tokenize import Row


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
        Row([index] * length, [False] + [True] * (length - 1))
        for index, length in enumerate(lengths)
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packing_is_a_permutation_of_the_rows(lengths: list[int]) -> None:
    rows = _rows(lengths)
    packed = pack_rows(rows, 40)
    expected = Counter((tuple(r.input_ids), tuple(map(int, r.loss_mask))) for r in rows)
    assert Counter(_documents(packed)) == expected
    assert all(len(row.input_ids) <= 40 for row in packed)
    assert sum(row.num_trained for row in packed) == sum(row.num_trained for row in rows)
    # No two sequences could be joined: at most one is filled by half or less.
    assert sum(2 * len(row.input_ids) <= 40 for row in packed) <= 1
    assert pack_rows(rows, 40) == packed


def test_each_row_goes_where_it_leaves_the_least_room() -> None:
    packed = pack_rows(_rows([6, 5, 4, 3, 2]), 10)
    assert [row.document_lengths for row in packed] == [(6, 4), (5, 3, 2)]


def test_real_length_distributions_fill_98_percent() -> None:
    # Log-normal lengths: about those of alpaca-cleaned (median 90 tokens, a few of 512).
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(5000, generator=generator) * 0.8 + 4.5
    lengths = logs.exp().clamp(8, 512).int().tolist()
    packed = pack_rows(_rows(lengths), 512)
    assert fill_rate(packed, 512) > 0.98
    assert fill_rate(packed, 512) == pytest.approx(sum(lengths) / (512 * len(packed)))


def test_a_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack_rows(_rows([9]), 8)


def test_positions_restart_at_every_document_and_at_the_padding() -> None:
    rows = [*pack_rows(_rows([4, 3]), 8), Row([9] * 9, [False] * 9)]
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
