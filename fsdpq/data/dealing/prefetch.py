"""Runs an iterator in a thread, a bounded number of items ahead.

Reading mapped files, tokenizing and numpy release Python's lock for most of their time, so a thread
is enough. It uses no multiprocessing: a rank has CUDA and collectives open, which must not be
forked.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

Item = TypeVar("Item")


class PrefetchClosed(Exception):  # noqa: N818 - an end, not a mistake
    """The prefetch was closed while somebody waited for an item."""


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    """Comes after the last item, and wakes who waits for one when the prefetch is closed."""


class Prefetch(Generic[Item]):
    """An iterator over the same items in the same order, made ahead of time.

    What the items' iterator raises is raised here, once the items before it were taken, with the
    traceback of the thread. Close it when it is left before its end: no thread stays behind.

    Args:
        items: is used in the thread only.
        depth: items that exist at most beside those that were taken, the one being made included.
        name: of the thread, for debuggers.
    """

    def __init__(self, items: Iterator[Item], *, depth: int, name: str) -> None:
        self._items = items
        self._slots = threading.Semaphore(depth)
        self._ready: SimpleQueue[Item | _Failure | _End] = SimpleQueue()
        self._is_closed = threading.Event()
        self._is_at_end = False
        self._thread = threading.Thread(target=self._make_items, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._is_closed.is_set():
            raise PrefetchClosed
        if self._is_at_end:
            raise StopIteration
        item = self._ready.get()
        if self._is_closed.is_set():
            raise PrefetchClosed
        if isinstance(item, _End | _Failure):
            self._is_at_end = True
            self._thread.join()
            if isinstance(item, _Failure):
                raise item.error
            raise StopIteration
        self._slots.release()
        return item

    def stop(self) -> None:
        """Tells the thread to end once the item that it is making is done; does not wait."""
        self._is_closed.set()
        self._slots.release()
        self._ready.put(_End())

    def close(self) -> None:
        """Stops the thread, and returns once it ended."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make_items(self) -> None:
        try:
            while True:
                self._slots.acquire()
                if self._is_closed.is_set():
                    break
                try:
                    item = next(self._items)
                except StopIteration:
                    break
                self._ready.put(item)
                del item  # the consumer's only: a batch here would outlive its step
            self._ready.put(_End())
        except BaseException as error:  # whatever it is, the consumer is who must hear of it
            self._ready.put(_Failure(error))
        finally:
            if isinstance(self._items, Generator):
                cast("Generator[Item, Any, Any]", self._items).close()
