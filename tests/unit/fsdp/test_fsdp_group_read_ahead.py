"""Which pages are asked for, and when: a few groups before they run, in both directions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import page_cache
from torch import nn

from fsdpq.fsdp import group_read_ahead
from fsdpq.fsdp.group_read_ahead import GroupReadAhead, apply_read_ahead

NUM_LAYERS = 5
MB = 1 << 20


class Layer(nn.Module):
    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.eye(4), requires_grad=False)
        self.adapter = nn.Parameter(torch.ones(4), requires_grad=trained)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden @ self.frozen * self.adapter,)


class Model(nn.Module):
    """An embedding, layers that return tuples as some of transformers do, a head."""

    def __init__(self, first_trained: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4).requires_grad_(False)
        self.layers = nn.ModuleList(
            Layer(trained=index >= first_trained) for index in range(NUM_LAYERS)
        )
        self.head = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            (hidden,) = layer(hidden)
        return self.head(hidden).sum()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens, in order: ``run`` of a group, and the group that is read."""
    found: list[Any] = []

    class AtOnce:
        def __init__(self, *_arguments: object) -> None: ...

        def submit(self, function: Callable[..., None], *arguments: object) -> None:
            function(*arguments)

    enter = GroupReadAhead._enter

    def noted(self: GroupReadAhead, cycle: list[int], at: int) -> None:
        found.append(f"run {cycle[at]}")
        enter(self, cycle, at)

    monkeypatch.setattr(group_read_ahead, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(GroupReadAhead, "_enter", noted)
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, at, _size, _what: found.append(at))
    return found


def prepare(model: Model, *, reshards: bool = True) -> None:
    """Makes group ``n`` byte ``n`` of the file."""
    groups = [[model.embedding], *([layer] for layer in model.layers), [model.head]]
    ranges = {
        id(parameter): (index, index + 1)
        for index, group in enumerate(groups)
        for parameter in group[0].parameters()
        if not parameter.requires_grad
    }
    apply_read_ahead(
        groups, layers=list(model.layers), descriptor=-1, ranges=ranges, reshards=reshards
    )


def test_next_groups_are_read_ahead_forward_and_backward(events: list[Any]) -> None:
    model = Model()
    prepare(model)
    ids = torch.tensor([1, 2])
    model(ids).backward()
    assert events == [
        "run 0", 1, 2, 3, "run 1", 4, "run 2", 5, "run 3", 6, "run 4",
        # Around the turn the last layers are there; from layer 4 on they may be gone again.
        "run 5", 4, "run 6", 3,
        "run 5", 2, "run 4", 1, "run 3", 0,
        # The next micro-batch begins where this one ends.
        "run 2", "run 1", 2,
    ]  # fmt: skip
    events.clear()
    model(ids)
    assert events[:6] == ["run 0", 3, "run 1", 4, "run 2", 5]


def test_without_gradients_the_first_group_follows_the_last(events: list[Any]) -> None:
    model = Model()
    prepare(model)
    with torch.no_grad():
        model(torch.tensor([1]))
    assert events[events.index("run 4") :] == ["run 4", 0, "run 5", 1, "run 6", 2]


def test_backward_reads_no_layer_below_the_first_trained(events: list[Any]) -> None:
    model = Model(first_trained=3)
    prepare(model)
    model(torch.tensor([1])).backward()
    assert events[events.index("run 6") :] == ["run 6", 0, "run 5", 1, "run 4", 2]


def test_weights_that_stay_gathered_are_not_read_for_backward(events: list[Any]) -> None:
    model = Model()
    prepare(model, reshards=False)
    model(torch.tensor([1])).backward()
    assert events[events.index("run 6") :] == ["run 6", 2]


def test_what_runs_already_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    ahead = GroupReadAhead(-1, [[], [(0, 100 * MB)]], layers=[], first_trained=None)

    def slow(_file: int, at: int, _size: int, _what: int) -> None:
        read.append(at)
        if len(read) == 2:
            ahead.enter_forward(1)

    monkeypatch.setattr(os, "posix_fadvise", slow)
    ahead._announce(1, 1)
    assert read == [0, group_read_ahead.PIECE_BYTES]


def test_pages_come_into_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * MB))
    page_cache.drop(path)
    if page_cache.resident_bytes(path, 0, 6 * MB):
        pytest.skip("this file system keeps its pages in memory")
    with path.open("rb") as file:
        ahead = GroupReadAhead(
            file.fileno(),
            [[(index * MB, (index + 1) * MB)] for index in range(6)],
            layers=list(range(6)),
            first_trained=0,
        )
        ahead.enter_forward(0)
        deadline = time.monotonic() + 30
        while page_cache.resident_bytes(path, MB, 4 * MB) < 3 * MB:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert page_cache.resident_bytes(path, 4 * MB, 6 * MB) == 0
