"""The tries of doctor notice what they are there for; copies between CPUs stand for GPUs'."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fsdpq.worker import probe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _source, _target: True)


def damage(copy: Callable[[], Any], *_devices: object) -> float:
    """Copies, and flips one bit of what arrives."""
    copy()[-1] ^= 1
    return 1.0


def test_copies_are_compared_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = torch.device("cpu", 0)
    assert probe.copy_to_host(CPU)["different"] == 0
    assert probe.copy_to_peer(peer, peer)["different"] == 0
    monkeypatch.setattr(probe, "_rate", damage)
    assert probe.copy_to_peer(peer, peer)["different"] == 1
    monkeypatch.setattr(probe, "_rate", lambda _copy, *_devices: 1.0)
    assert probe.copy_to_peer(peer, peer)["different"] > 60_000, "nothing arrived"


def test_patterns_of_two_devices_differ() -> None:
    first, second = (torch.empty(1 << 16, dtype=torch.uint8) for _ in range(2))
    probe.pattern(first, 1)
    probe.pattern(second, 2)
    assert int((first == second).sum()) == 0
    assert len(first.unique()) == 251


def test_product_that_is_wrong_in_one_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.multiply(CPU) == {"different": 0, "entries": probe.SIDE**2}
    right = torch.Tensor.__matmul__

    def wrong(left: Any, other: Any) -> Any:
        found = right(left, other)
        if found.dtype is torch.bfloat16:
            found[3, 5] += 1
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert probe.multiply(CPU)["different"] == 1


def test_pinning_stops_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right, given = torch.empty, 0

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Any:
        nonlocal given
        given += 1
        if given > 3:
            raise RuntimeError("CUDA error: invalid argument\nmore")
        return right(1, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        probe.psutil, "virtual_memory", lambda: type("Free", (), {"available": 1 << 40})
    )
    found = probe.pin_memory()
    assert found == {"pinned_bytes": 3 << 28, "failure": "CUDA error: invalid argument"}


def test_every_try_says_that_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Any:
        raise OSError("no such library\nat all")

    assert probe.attempt("a", lambda: {"x": 1})
    assert not probe.attempt("b", fail)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["probe"] for row in rows] == ["a", "a", "b", "b"]
    assert rows[1]["x"] == 1
    assert (rows[2], rows[3]["error"]) == (
        {"probe": "b", "state": "start"}, "OSError: no such library",
    )  # fmt: skip
