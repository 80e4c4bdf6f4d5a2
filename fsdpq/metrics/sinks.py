"""Where rank 0 writes what the screen and the report read; see `fsdpq.run_files`.

The only module that imports wandb. A service that cannot be reached never ends a run: the sink says
so once, and the metrics are in ``metrics.jsonl`` anyway.
"""

from __future__ import annotations

import collections
import importlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdpq.recipe.sections.output import WandbOptions
from fsdpq.run_files.writing import append_json_lines

MAX_WAITING = 10_000
"""Rows that are kept while the disk takes none; the oldest are dropped first."""


WANDB_FINISH_S = 60.0
"""How long the end of a run waits for wandb to send what is left."""


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

    def __init__(self, sinks: Sequence[JsonlSink | NoSink | TensorboardSink | WandbSink]) -> None:
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
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        self._notify = notify
        self._open = SummaryWriter
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
        if self._writer is not None:
            self._writer.close()
        self._writer = self._open(str(self._directory), **options)

    def _write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.get("step", 0))
        self._writer.flush()

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            self._writer = None
            self._notify(
                f"TensorBoard's files cannot be written ({error}): metrics go to metrics.jsonl "
                "only from here on"
            )


class WandbSink:
    """Sends the numbers of a row to Weights & Biases, from a thread: nothing waits for the service.

    A package that is missing is found before the launch (`fsdpq.registry.check_packages`).

    Args:
        options: project and so on.
        directory: where wandb keeps its files.
        name: of the run, where the options give none.
        run_id: by which a resumed run goes on where the first was.
        settings: the recipe, as plain values.
        notify: told once when wandb fails or does not answer; rows are dropped from then on.
    """

    def __init__(
        self,
        options: WandbOptions,
        directory: Path,
        *,
        name: str,
        run_id: str,
        settings: Mapping[str, Any],
        notify: Callable[[str], Any],
    ) -> None:
        self._notify = notify
        self._run: Any = None
        self._has_failed = False
        self._actions: queue.Queue[Callable[[], Any] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._send, daemon=True, name="fsdpq-wandb")
        self._put(
            lambda: self._start(
                project=options.project,
                entity=options.entity,
                group=options.group,
                name=options.name or name,
                tags=list(options.tags),
                mode=options.mode,
                dir=str(directory),
                config=dict(settings),
                id=run_id,
                resume="allow",
            )
        )
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Sends one row, soon."""
        numbers, step = scalars(row), row.get("step", 0)
        if numbers:
            self._put(lambda: self._run.log(numbers, step=step))

    def finish(self) -> None:
        """Sends what is left; waits `WANDB_FINISH_S` at most."""
        self._put(self._finish)
        self._put(None)
        if not self._has_failed:
            self._thread.join(WANDB_FINISH_S)
            if self._thread.is_alive():
                self._fail(f"no answer for {WANDB_FINISH_S:.0f} s")

    def _start(self, **settings: Any) -> None:
        self._run = importlib.import_module("wandb").init(**settings)

    def _finish(self) -> None:
        self._run.finish()

    def _put(self, action: Callable[[], Any] | None) -> None:
        if self._has_failed:
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._fail(f"{MAX_WAITING} rows wait to be sent")

    def _send(self) -> None:
        """Runs in the thread."""
        while not self._has_failed and (action := self._actions.get()) is not None:
            try:
                action()
            except Exception as error:  # a foreign service must not end a run, whatever it raises
                self._fail(str(error))

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._notify(f"wandb failed ({reason}): metrics go to metrics.jsonl only from here on")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by the name they have in other tools (``train/loss``)."""
    group = {"step": "train", "eval": "eval", "memory": "memory"}.get(row["event"])
    if group is None:
        return {}
    prefix = f"{group}/{row['phase']}" if group == "memory" else group
    return {
        f"{prefix}/{key}": float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "total_steps", "time")
    }
