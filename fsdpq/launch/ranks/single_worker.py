"""Running one worker process without torchrun, and explaining why it failed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import FsdpqError, LaunchError, RunStoppedError
from fsdpq.launch.ranks.failure import (
    MEMORY_HINT,
    count_new_oom_kills,
    count_oom_kills,
    explain_rank_error,
    explain_signal,
    read_rank_error,
)
from fsdpq.launch.ranks.processes import ProcessTree, catch_stop_signals, worker_environment

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A job's own process group is none of the worker's."""

MAX_LINE_BYTES = 4096
PROGRESS_S = 5.0


@dataclass(frozen=True)
class WorkerFiles:
    """Where a single worker writes.

    Attributes:
        output: its standard output; removed after a success.
        log: its standard error.
        error: where its guard records what ended it.
    """

    output: Path
    log: Path
    error: Path


class RowProgress:
    """Says now and then how many rows a worker has done; give `take` as ``on_line``.

    Args:
        report: told one short line.
        verb: what is done to them, ``tokenized``.
    """

    def __init__(self, report: Callable[[str], None], verb: str) -> None:
        self._report, self._verb = report, verb
        self._last = time.monotonic()

    def take(self, line: str) -> None:
        """Takes a line of JSON: ``done_rows``, ``total_rows`` (0 where that is not known)."""
        now = time.monotonic()
        row: dict[str, int] = json.loads(line)
        done, total = row["done_rows"], row["total_rows"]
        if now - self._last < PROGRESS_S or (total and done >= total):
            return
        self._last = now
        of = f" of {total:,}" if total else ""
        self._report(f"{self._verb} {done:,}{of} rows")


def run_single_worker(
    arguments: Sequence[str],
    files: WorkerFiles,
    *,
    on_line: Callable[[str], None] | None = None,
    memory_hint: str = MEMORY_HINT,
    network: bool = False,
) -> str:
    """Runs ``python`` with ``arguments`` to its end and returns what it printed.

    Args:
        arguments: of Python.
        files: where the worker writes.
        on_line: told the last whole line that the worker printed, while it runs.
        memory_hint: what to do where the system killed it for its memory.
        network: let it ask the hub, with the user's token.

    Raises:
        RunStoppedError: a signal stopped it.
        FsdpqError: whatever the worker reports.
    """
    files.log.unlink(missing_ok=True)
    files.error.unlink(missing_ok=True)
    oom_kills = count_oom_kills()
    environment = worker_alone_environment(network=network)
    code = _run([sys.executable, *arguments], files, environment, on_line)
    if code == 0:
        text = files.output.read_text(encoding="utf-8")
        files.output.unlink()
        return text.removesuffix("\n")
    raise explain_end(code, files, oom_kills, memory_hint=memory_hint)


def explain_end(
    code: int, files: WorkerFiles, oom_kills: Mapping[str, int], *, memory_hint: str = MEMORY_HINT
) -> FsdpqError:
    """Returns the error that tells the user why a worker ended.

    Args:
        code: its exit code, negative for a signal.
        files: where it wrote.
        oom_kills: `count_oom_kills` from before it was started.
        memory_hint: what to do where the system killed it for its memory.
    """
    error = read_rank_error(files.error)
    if error is not None:
        return explain_rank_error(error, log=files.log)
    if code < 0:
        killed = explain_signal("the worker", -code, count_new_oom_kills(oom_kills))
        killed.hint = memory_hint if killed.hint == MEMORY_HINT else f"its log is `{files.log}`"
        return killed
    tail = "\n".join(files.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    return LaunchError(f"the worker ended with exit code {code}", f"its log is `{files.log}`", tail)


def worker_alone_environment(*, network: bool = False) -> dict[str, str]:
    """Returns the environment of a worker that is no rank of a job; see `worker_environment`."""
    environment = worker_environment(num_ranks=1, network=network)
    for name in GROUP_VARIABLES:
        environment.pop(name, None)
    return environment


def _run(
    command: list[str],
    files: WorkerFiles,
    environment: dict[str, str],
    on_line: Callable[[str], None] | None,
) -> int:
    with catch_stop_signals() as stop:
        tree = ProcessTree(command, environment=environment, stdout=files.output, stderr=files.log)
        try:
            while (code := tree.poll()) is None and not stop.received:
                time.sleep(0.05)
                if on_line is not None and (line := _last_line(files.output)):
                    on_line(line)
            if code is None:
                tree.stop(stop)
                raise RunStoppedError(f"stopped by {stop.name}")
        finally:
            tree.kill()
    return code


def _last_line(path: Path) -> str:
    """Returns the last whole line of a growing file, empty where it has none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_LINE_BYTES))
        *lines, _ = file.read().decode("utf-8", errors="replace").split("\n")
    return lines[-1] if lines else ""
