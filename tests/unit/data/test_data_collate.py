"""Micro-batches: nothing lost, nothing doubled, all ranks in step, positions exact."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import random_rows

from fsdpq.data.dealing.collate import build_step, collate
from fsdpq.data.text.tokenize import Row


def _targets(rows: list[Row]) -> Counter[int]:
    pairs = [zip(row.input_ids, row.loss_mask, strict=True) for row in rows]
    return Counter(int(token) for pair in pairs for token, trained in pair if trained)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("num_rows", [1, 4, 7, 16])
def test_every_row_is_computed_once_and_all_ranks_stay_in_step(
    world_size: int, micro_batch_size: int, num_rows: int
) -> None:
    batch = random_rows(num_rows)
    steps = [
        build_step(batch, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(step.micro_batches) for step in steps}) == 1
    micro_batches = [m for step in steps for m in step.micro_batches]
    assert all(m.input_ids.shape[0] <= micro_batch_size for m in micro_batches)
    found = Counter(t for m in micro_batches for t in m.targets.tolist())
    assert found == _targets(batch)
    assert {step.num_trained for step in steps} == {sum(row.num_trained for row in batch)}
    assert steps[0].num_tokens == sum(len(row.input_ids) for row in batch)


def test_collate_points_each_position_at_its_next_token() -> None:
    rows = [_row([5, 6, 7], [0, 0, 1]), _row([8, 9, 3, 4], [0, 1, 0, 1])]
    batch = collate(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 3, 4]]
    assert batch.loss_positions.tolist() == [1, 4, 6]
    assert batch.targets.tolist() == [7, 9, 4]
    assert batch.is_token.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.num_tokens == 7


def test_no_rows_give_a_batch_that_can_be_computed() -> None:
    batch = collate([])
    assert batch.input_ids.shape == (1, 1)
    assert batch.targets.numel() == 0
    assert batch.num_tokens == 0
    assert batch.is_token.tolist() == [[False]]
    assert batch.targets.dtype == torch.int64


def _row(ids: list[int], mask: list[int], documents: tuple[int, ...] = ()) -> Row:
    return Row(ids, mask, documents)  # pyright: ignore[reportArgumentType]


def _documents() -> st.SearchStrategy[list[list[list[tuple[int, int]]]]]:
    token = st.tuples(st.integers(1, 300), st.integers(0, 1))
    return st.lists(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1), min_size=1)


@settings(deadline=None, max_examples=60)
@given(rows=_documents(), packed=st.booleans())
def test_a_micro_batch_is_what_a_loop_over_tokens_gives(
    rows: list[list[list[tuple[int, int]]]], packed: bool
) -> None:
    if not packed:
        rows = [documents[:1] for documents in rows]
    width = max(sum(map(len, documents)) for documents in rows)
    ids, places, targets, positions, made = [], [], [], [], []
    for number, documents in enumerate(rows):
        line = [token for document in documents for token, _ in document]
        mask = [bit if at else 0 for document in documents for at, (_, bit) in enumerate(document)]
        made.append(_row(line, mask, tuple(map(len, documents)) if packed else ()))
        padding = width - len(line)
        ids.append(line + [0] * padding)
        positions.append([at for document in documents for at in range(len(document))])
        positions[-1] += range(padding)
        for at, bit in enumerate(mask):
            if bit:
                places.append(number * width + at - 1)
                targets.append(line[at])
    batch = collate(made)
    assert batch.input_ids.tolist() == ids
    assert batch.loss_positions.tolist() == places
    assert batch.targets.tolist() == targets
    if packed:
        assert batch.position_ids is not None
        assert batch.position_ids.tolist() == positions
    else:
        assert batch.position_ids is None
