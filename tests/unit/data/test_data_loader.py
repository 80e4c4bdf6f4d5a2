"""Dealing rows: nothing lost, nothing doubled, and all ranks in step."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from support.tiny import random_rows

from fsdpq.data.loader import build_step, collate, iterate_steps, split_rows
from fsdpq.data.tokenize import Row


def _targets(rows: list[Row]) -> Counter[int]:
    pairs = [zip(row.input_ids, row.loss_mask, strict=True) for row in rows]
    return Counter(token for pair in pairs for token, trained in pair if trained)


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
    rows = [Row([5, 6, 7], [False, False, True]), Row([8, 9, 3, 4], [False, True, False, True])]
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


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own() -> None:
    rows = [Row([i, i, i], [False, True, True]) for i in range(12)]
    options = {"global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1, "seed": 3}
    steps = islice(iterate_steps(rows, **options), 6)  # pyright: ignore[reportArgumentType]
    seen = [int(row[0]) for step in steps for m in step.micro_batches for row in m.input_ids]
    first, second = seen[:12], seen[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    batches = [sorted(seen[start : start + 4]) for start in range(0, 24, 4)]
    assert batches[:3] != batches[3:]


def test_held_out_rows_are_disjoint_from_the_others_and_depend_on_the_seed() -> None:
    train, held_out = split_rows(100, 0.1, seed=1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(100))
    assert split_rows(100, 0.1, seed=1) == (train, held_out)
    assert split_rows(100, 0.1, seed=2) != (train, held_out)
    assert split_rows(5, 0.0, seed=1) == ([0, 1, 2, 3, 4], [])
    assert len(split_rows(5, 0.01, seed=1)[1]) == 1
