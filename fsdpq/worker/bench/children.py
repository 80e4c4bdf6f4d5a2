"""Fresh processes that do one piece of work each and answer with JSON.

A process of its own has nothing of the coordinator's memory, and imports and what libraries set up
on first use are over before it measures. `run_child` is what runs in it.
"""

from __future__ import annotations

import json
import os
import pkgutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsdpq.errors import LaunchError

POLL_S = 0.2
CHILD = (sys.executable, "-m", "fsdpq.worker", "bench-child")
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Work:
    """What a group of processes does.

    Attributes:
        name: for messages and file names.
        function: ``package.module:name``; called with ``arguments``, returns JSON data.
        arguments: JSON data.
        num_processes: ranks of one group.
        threads: of torch in each.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    num_processes: int = 1
    threads: int = 1


def run_children(
    work: Work, directory: Path, *, on_poll: Callable[[Sequence[int]], None] | None = None
) -> list[Any]:
    """Runs all processes of ``work`` to their end and returns what each answered, by rank.

    Args:
        work: what they do.
        directory: exists; for their files.
        on_poll: told the process ids now and then, while they run.

    Raises:
        LaunchError: one of them failed.
    """
    stem = "".join(c if c.isalnum() else "-" for c in work.name)
    stem += f"-{time.monotonic_ns()}"
    arguments = directory / f"{stem}.arguments.json"
    arguments.write_text(json.dumps(dict(work.arguments), default=str), encoding="utf-8")
    outs = [directory / f"{stem}.{rank}.json" for rank in range(work.num_processes)]
    shared = os.environ | QUIET | {"OMP_NUM_THREADS": str(work.threads)}
    shared |= {"WORLD_SIZE": str(work.num_processes)} | _rendezvous()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, out in enumerate(outs):
            with out.with_suffix(".log").open("wb") as log:
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(_start(work.function, arguments, out, log, environment))
        failed = _wait(processes, on_poll)
        if failed is not None:
            raise child_error(work.name, processes[failed].returncode, outs[failed])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


def run_child(function: str, arguments: Path, out: Path) -> None:
    """Does the work of one process; ``out`` gets the answer."""
    found = pkgutil.resolve_name(function)(**json.loads(arguments.read_text(encoding="utf-8")))
    out.write_text(json.dumps(found), encoding="utf-8")


def child_error(name: str, code: int, out: Path) -> LaunchError:
    """Returns why a process failed: what its guard recorded, or the end of its log."""
    log = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    tail = "\n".join(log.splitlines()[-25:])
    error = out.with_suffix(".error")
    if error.exists():
        record = json.loads(error.read_text(encoding="utf-8"))
        return LaunchError(f"{name}: {record['message']}", record["hint"], tail)
    hint = "it needs more memory than there is" if code == -9 else ""
    return LaunchError(f"{name} ended with exit code {code}", hint, tail)


def _start(
    function: str, arguments: Path, out: Path, log: BinaryIO, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [*CHILD, function, str(arguments), str(out), f"--error={out.with_suffix('.error')}"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    on_poll: Callable[[Sequence[int]], None] | None,
) -> int | None:
    """Waits for all, or for the first that fails; returns its rank.

    The others would wait for it: the caller ends them.
    """
    pids = [process.pid for process in processes]
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        if on_poll is not None:
            on_poll(pids)
        time.sleep(POLL_S)


def _rendezvous() -> dict[str, str]:
    """Returns where the ranks of one group meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
