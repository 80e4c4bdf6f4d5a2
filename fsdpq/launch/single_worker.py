"""Running one worker process without torchrun, and explaining why it failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import LaunchError, RunStoppedError
from fsdpq.launch.failure import explain_rank_error, read_rank_error
from fsdpq.launch.processes import ProcessTree, catch_stop_signals, worker_environment

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A job's own process group is none of the worker's."""


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


def run_single_worker(arguments: Sequence[str], files: WorkerFiles) -> str:
    """Runs ``python`` with ``arguments`` to its end and returns what it printed.

    Raises:
        RunStoppedError: a signal stopped it.
        FsdpqError: whatever the worker reports.
    """
    files.log.unlink(missing_ok=True)
    files.error.unlink(missing_ok=True)
    code = _run([sys.executable, *arguments], files)
    if code == 0:
        text = files.output.read_text(encoding="utf-8")
        files.output.unlink()
        return text.removesuffix("\n")
    error = read_rank_error(files.error)
    if error is not None:
        raise explain_rank_error(error, log=files.log)
    tail = "\n".join(files.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    raise LaunchError(f"the worker ended with exit code {code}", f"its log is `{files.log}`", tail)


def _run(command: list[str], files: WorkerFiles) -> int:
    environment = worker_environment(num_ranks=1)
    for name in GROUP_VARIABLES:
        environment.pop(name, None)
    with catch_stop_signals() as stop:
        tree = ProcessTree(command, environment=environment, stdout=files.output, stderr=files.log)
        try:
            while (code := tree.poll()) is None and not stop.received:
                time.sleep(0.05)
            if code is None:
                tree.stop(stop)
                raise RunStoppedError(f"stopped by {stop.name}")
        finally:
            tree.kill()
    return code
