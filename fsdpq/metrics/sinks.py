"""Where rank 0 writes what the screen and the report read; see `fsdpq.run_files`.

What fails beside ``metrics.jsonl`` never ends a run: it is said once, and the numbers are there
anyway. Weights & Biases is no sink of a rank: `fsdpq.launch.tracking` reads what is written here.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdpq.run_files.scalars import scalars
from fsdpq.run_files.writing import append_json_lines

MAX_WAITING = 10_000
"""Rows that are kept while the disk takes none; the oldest are dropped first."""


class JsonlSink:
    """Appends rows to a JSON-lines file, with the time in seconds since the epoch.

    A disk that is full or gone never ends a run: rows wait in memory until it takes them. Whoever
    looks at the run from outside says so (`fsdpq.launch.ranks.keeper`); here it goes to the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_WAITING)
        self._is_told = False
        self._lock = threading.Lock()  # a checkpoint's thread writes events too
        _drop_torn_line(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row, after those that wait."""
        with self._lock:
            self._waiting.append({**row, "time": time.time()})
            self._append()

    def finish(self) -> None:
        """Appends what waits, if the disk takes it now."""
        with self._lock:
            self._append()

    def _append(self) -> None:
        try:
            append_json_lines(self.path, self._waiting)
        except OSError as error:
            if not self._is_told:
                sys.stderr.write(f"{self.path} takes no rows, they wait: {error}\n")
            self._is_told = True
        else:
            self._waiting.clear()
            self._is_told = False


def _drop_torn_line(path: Path) -> None:
    """Cuts off what a killed process left of a last line, so that others can be appended."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


class NoSink:
    """Takes rows and drops them: what ranks other than 0 have."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Drops one row."""

    def finish(self) -> None:
        """Does nothing."""


class ManySinks:
    """Passes rows on to several sinks."""

    def __init__(self, sinks: Sequence[JsonlSink | NoSink | TensorboardSink]) -> None:
        self.sinks = sinks

    def finish(self) -> None:
        """Sends what is left."""
        for sink in self.sinks:
            sink.finish()

    def go_on_after(self, step: int) -> None:
        """Voids rows of later steps where a sink can: a resumed run writes them again."""
        for sink in self.sinks:
            if isinstance(sink, TensorboardSink):
                sink.go_on_after(step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Gives one row to each."""
        for sink in self.sinks:
            sink.write(row)


class TensorboardSink:
    """Writes the numbers of a row as scalars of TensorBoard.

    Args:
        directory: where the event files go.
        notify: told once where the disk takes no more; rows are dropped from then on.
    """

    def __init__(self, directory: Path, *, notify: Callable[[str], Any]) -> None:
        self._directory = directory
        self._notify = notify
        self._writer: Any = None
        self._attempt(self._start)

    def go_on_after(self, step: int) -> None:
        """Hides what another run of the same directory wrote after ``step``."""
        if self._writer is not None:
            self._attempt(lambda: self._start(purge_step=step + 1))

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row, at once."""
        if self._writer is not None:
            self._attempt(lambda: self._write(row))

    def finish(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _start(self, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(str(self._directory), **options)

    def _write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.get("step", 0))
        self._writer.flush()

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, or packages that do not fit one another
            self._writer = None
            self._notify(
                f"TensorBoard's files cannot be written ({error}): metrics go to metrics.jsonl "
                "only from here on"
            )
