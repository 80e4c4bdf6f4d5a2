"""A thread that runs ahead: same items, bounded, its errors heard, nothing left behind."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from fsdpq.data.dealing.prefetch import Prefetch, PrefetchClosed

WAIT_S = 20.0


def _wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")}


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(Prefetch(iter(range(100)), depth=3, name="ahead")) == list(range(100))
    assert not _threads()


def test_it_makes_depth_items_ahead_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    with Prefetch(items(), depth=2, name="ahead") as ahead:
        _wait_until(lambda: len(made) == 2)
        assert next(ahead) == 0
        _wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert len(made) == 3
    assert not _threads()


def test_an_error_comes_after_the_items_before_it_with_its_own_traceback() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("a bad row")

    ahead = Prefetch(items(), depth=4, name="ahead")
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="a bad row") as caught:
        next(ahead)
    assert "in items" in "".join(traceback.format_exception(caught.value))
    assert not _threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_ends_a_thread_that_waits_for_room_and_closes_its_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = Prefetch(items(), depth=1, name="ahead")
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert not _threads()
    with pytest.raises(PrefetchClosed):
        next(ahead)


def test_closing_wakes_who_waits_for_an_item() -> None:
    release, ends = threading.Event(), []

    def items() -> Iterator[int]:
        release.wait(WAIT_S)
        yield 0

    ahead = Prefetch(items(), depth=1, name="ahead")

    def consume() -> None:
        try:
            next(ahead)
        except PrefetchClosed as error:
            ends.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    ahead.stop()
    consumer.join(WAIT_S / 4)
    assert len(ends) == 1
    release.set()
    ahead.close()
    assert not _threads()
