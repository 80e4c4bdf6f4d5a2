"""Dealing rows: each as often as asked, the same on any number of ranks, and to be resumed."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsdpq.data.dealing.collate import Step
from fsdpq.data.dealing.loader import Deal, EpochOrder, Loader, split_rows
from fsdpq.data.text.tokenize import Row
from fsdpq.errors import CheckpointError

LENGTHS = (3, 7, 4, 9, 5)


def _rows(count: int) -> list[Row]:
    """Returns rows of uneven length whose tokens are their number."""
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return [
        Row([number + 1] * length, [0] + [1] * (length - 1))  # pyright: ignore[reportArgumentType]
        for number, length in enumerate(lengths)
    ]


def _loader(num_rows: int, deal: Deal, *, seed: int = 3, shuffle: bool = True) -> Loader:
    order = EpochOrder(_rows(num_rows), seed=seed, digest="rows", shuffle=shuffle)
    return Loader(order, deal)


def _numbers(steps: list[Step]) -> list[list[int]]:
    """Returns the rows of every step of one rank."""
    return [
        [int(line[0]) for m in step.micro_batches if m.num_tokens for line in m.input_ids]
        for step in steps
    ]


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def _all_ranks(num_rows: int, deal: Deal, **options: Any) -> list[list[int]]:
    """Returns the sorted rows of every step over all ranks; checks that the ranks agree."""
    of_ranks: list[list[Step]] = []
    for rank in range(deal.world_size):
        with _loader(num_rows, replace(deal, rank=rank), **options) as loader:
            of_ranks.append(list(loader))
    steps = list(zip(*of_ranks, strict=True))
    for step in steps:
        assert len({len(part.micro_batches) for part in step}) == 1
        assert len({(part.num_trained, part.num_tokens) for part in step}) == 1
        found = sum(len(m.targets) for part in step for m in part.micro_batches)
        assert found == step[0].num_trained
    numbers = [_numbers(steps) for steps in of_ranks]
    return [sorted(_joined(parts)) for parts in zip(*numbers, strict=True)]


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 30),
    epochs=st.sampled_from([0.3, 1, 1.5, 2]),
    batch=st.integers(1, 12),
    micro=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_epoch_has_every_row_once_for_any_number_of_ranks(
    num_rows: int, epochs: float, batch: int, micro: int, seed: int
) -> None:
    total = max(1, round(epochs * num_rows))
    deals = [Deal(batch, micro, 0, world_size, total) for world_size in range(1, 6)]
    steps, *others = [_all_ranks(num_rows, deal, seed=seed) for deal in deals]
    assert all(other == steps for other in others)
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert sum(map(len, steps)) == total
    counts = Counter(number for step in steps for number in step)
    assert max(counts.values()) - min(counts[number + 1] for number in range(num_rows)) <= 1


def test_rows_come_epoch_by_epoch_each_in_an_order_of_its_own() -> None:
    with _loader(12, Deal(4, 4, 0, 1)) as loader:
        batches = _numbers(list(islice(loader, 6)))
    first, second = _joined(batches[:3]), _joined(batches[3:])
    assert sorted(first) == sorted(second) == list(range(1, 13))
    assert [sorted(batch) for batch in batches[:3]] != [sorted(batch) for batch in batches[3:]]


def test_a_batch_runs_over_the_end_of_an_epoch_where_steps_are_counted() -> None:
    with _loader(5, Deal(3, 3, 0, 1), shuffle=False) as loader:
        batches = [sorted(batch) for batch in _numbers(list(islice(loader, 5)))]
    assert batches == [[1, 2, 3], [1, 4, 5], [2, 3, 4], [1, 2, 5], [3, 4, 5]]


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 20),
    batch=st.integers(1, 8),
    done=st.integers(0, 9),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_run_goes_on_where_another_stopped_with_any_number_of_ranks(
    num_rows: int, batch: int, done: int, ranks: tuple[int, int]
) -> None:
    whole = _all_ranks(num_rows, Deal(batch, 2, 0, 1, 10 * batch))
    with _loader(num_rows, Deal(batch, 3, 0, ranks[0], 10 * batch)) as loader:
        assert len(list(islice(loader, done))) == done
        state = json.loads(json.dumps(loader.state_dict()))
    assert (state["steps"], state["rows"]) == (done, done * batch)
    rest: list[list[list[int]]] = []
    for rank in range(ranks[1]):
        with _loader(num_rows, Deal(batch, 1, rank, ranks[1], 10 * batch)) as loader:
            loader.load_state_dict(state)
            rest.append(_numbers(list(loader)))
    assert [sorted(_joined(parts)) for parts in zip(*rest, strict=True)] == whole[done:]


def test_a_loader_can_go_back_and_steps_built_ahead_do_not_count() -> None:
    with _loader(9, Deal(2, 2, 0, 1)) as loader:
        start = loader.state_dict()
        first = _numbers(list(islice(loader, 3)))
        assert loader.state_dict()["position"] == {"epoch": 1, "window": 0, "row": 6}
        loader.load_state_dict(start)
        assert _numbers(list(islice(loader, 3))) == first


@pytest.mark.parametrize(
    ("num_rows", "options", "words"),
    [
        (10, {}, "other training rows"),
        (9, {"shuffle": False}, "other training rows"),
        (9, {"seed": 4}, "training.seed: 3"),
    ],
)
def test_a_place_in_other_rows_is_refused(
    num_rows: int, options: dict[str, Any], words: str
) -> None:
    deal = Deal(2, 2, 0, 1)
    state = _loader(9, deal).state_dict()
    with pytest.raises(CheckpointError, match=words):
        _loader(num_rows, deal, **options).load_state_dict(state)


def test_no_thread_stays_behind_when_training_ends_early() -> None:
    with _loader(9, Deal(2, 2, 0, 1)) as loader:
        next(loader)
    assert not [thread for thread in threading.enumerate() if "fsdpq" in thread.name]


def test_a_rank_reads_its_own_rows_only() -> None:
    read: list[int] = []

    class Watched(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    order = EpochOrder(Watched(_rows(8)), seed=1, digest="", shuffle=True)
    with Loader(order, Deal(4, 2, 1, 2, 8)) as loader:
        steps = list(loader)
    assert len(read) == 4
    assert sorted(_joined(_numbers(steps))) == sorted(index + 1 for index in read)


def test_held_out_rows_are_disjoint_from_the_others_and_depend_on_the_seed() -> None:
    train, held_out = split_rows(100, 0.1, seed=1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(100))
    assert split_rows(100, 0.1, seed=1) == (train, held_out)
    assert split_rows(100, 0.1, seed=2) != (train, held_out)
    assert split_rows(5, 0.0, seed=1) == ([0, 1, 2, 3, 4], [])
    assert len(split_rows(5, 0.01, seed=1)[1]) == 1


def test_pinned_steps_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    order = EpochOrder(_rows(8), seed=1, digest="", shuffle=True)
    gpu = torch.device("cuda", 1)
    with Loader(order, Deal(4, 2, 0, 1, 8), pin_to=gpu) as loader:
        steps = list(loader)
    with Loader(order, Deal(4, 2, 0, 1, 8)) as loader:
        plain = list(loader)
    assert chosen == [gpu]
    assert len(pinned) == 2 * 2 * 4
    assert _numbers(steps) == _numbers(plain)
