"""Applies a function to items in several processes, with results in the order of the items.

The processes are forks: the function, with the tokenizer that it holds, is there without being sent
or loaded again. Only items and results travel. So this must run before anything that a fork breaks:
no threads of torch or of the tokenizer, no process group. One item at a time is with each process,
and few results wait for an earlier one, so memory does not grow with the number of items.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from fsdpq.errors import FsdpqError, LaunchError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_EARLY_RESULTS = 4
"""Results per process that may wait for an earlier one."""

_JOIN_S = 5.0


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_processes: int
) -> Iterator[Result]:
    """Yields ``function(item)`` for every item, in order.

    A single item, or a single process, is computed here. Elsewhere than on Linux forks are not
    safe (https://bugs.python.org/issue33725), and everything is computed here.

    Args:
        function: what a process does; inherited, never pickled.
        items: read here, while the processes work; pickled.
        num_processes: at most so many.

    Raises:
        FsdpqError: as the function raised it.
        LaunchError: a process died.
        RuntimeError: the function raised anything else; has its traceback.
    """
    rest = iter(items)
    first = list(itertools.islice(rest, 2))
    rest = itertools.chain(first, rest)
    if num_processes == 1 or len(first) < 2 or sys.platform != "linux":
        yield from map(function, rest)
        return
    with _started(function, num_processes) as children:
        yield from _Dealer(children, rest).results()


class _Child:
    """A process that computes results, and this end of the pipe to it."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.number = -1

    def send(self, number: int, item: Any) -> None:
        self.number = number
        try:
            self.pipe.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise self.explain_death() from error

    def receive(self) -> Any:
        """Returns the result of the item that was sent last."""
        try:
            answer = pickle.loads(self.pipe.recv_bytes())  # noqa: S301 - our own fork wrote it
        except (EOFError, OSError) as error:
            raise self.explain_death() from error
        if isinstance(answer, _Failed):
            raise answer.error
        return answer

    def explain_death(self) -> LaunchError:
        self.process.join(_JOIN_S)
        code = self.process.exitcode
        message = f"one of the processes that tokenize ended with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            message = f"one of the processes that tokenize was killed ({name})"
            if name == "SIGKILL":
                message += ": that is how the system ends a process when memory runs out"
        hint = "`fsdpq prepare RECIPE --processes 1` needs the least memory; training then uses it"
        return LaunchError(message, hint=hint)


class _Failed:
    """What a function raised, on its way here."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        if not isinstance(error, FsdpqError):
            self.error = RuntimeError(traceback.format_exc())


class _Dealer(Generic[Item]):
    """Gives items to idle processes and puts their results in order."""

    def __init__(self, children: list[_Child], items: Iterator[Item]) -> None:
        self._idle, self._items = list(children), items
        self._busy: dict[Any, _Child] = {}
        self._most_early = MAX_EARLY_RESULTS * len(children)
        self._ready: list[Item] = []  # the next item, read while all are busy
        self._early: dict[int, Any] = {}
        self._num_sent = self._num_yielded = 0

    def results(self) -> Iterator[Any]:
        while True:
            self._deal()
            if not self._busy:
                return
            for pipe in wait(list(self._busy)):
                child = self._busy.pop(pipe)
                self._early[child.number] = child.receive()
                self._idle.append(child)
            self._deal()  # processes work while the caller takes the results
            while self._num_yielded in self._early:
                yield self._early.pop(self._num_yielded)
                self._num_yielded += 1

    def _deal(self) -> None:
        while self._idle and self._num_sent - self._num_yielded < self._most_early:
            if not self._read():
                return
            child = self._idle.pop()
            child.send(self._num_sent, self._ready.pop())
            self._busy[child.pipe] = child
            self._num_sent += 1
        self._read()

    def _read(self) -> bool:
        """Has the next item ready; returns False where there is none."""
        if not self._ready:
            self._ready = list(itertools.islice(self._items, 1))
        return bool(self._ready)


@contextlib.contextmanager
def _started(
    function: Callable[[Any], Any], num_processes: int
) -> Generator[list[_Child], None, None]:
    """Gives the processes, and ends them."""
    context = multiprocessing.get_context("fork")
    children: list[_Child] = []
    gc.freeze()  # what is here now is shared with the forks, until a collection writes to it
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. The one that watches the launcher, and
            # those of test runners, hold no lock that a child takes.
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(num_processes):
                own, other = context.Pipe()
                inherited = [child.pipe for child in children] + [own]
                arguments = (function, other, inherited)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                other.close()
                children.append(_Child(process, own))
        yield children
    finally:
        gc.unfreeze()
        for child in children:
            child.pipe.close()  # a process that waits for an item ends
        for child in children:
            child.process.terminate()
            child.process.join(_JOIN_S)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()


def _serve(function: Callable[[Any], Any], pipe: Connection, inherited: list[Connection]) -> None:
    """Answers items until the other end of the pipe is closed, or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()  # else the pipes stay open when the parent is killed
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent wrote it
            try:
                answer = function(item)
            except Exception as error:
                answer = _Failed(error)
            pipe.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
