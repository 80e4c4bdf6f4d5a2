"""One launcher at a time in a run directory, and none before the ranks of the last one are gone.

Both are locks of the system that end with their process (`fsdpq.fetch.holds`), so nothing stale
can be left behind by a kill: a launcher has the run directory, each rank holds its folder of logs
(`fsdpq.worker.keeping.presence`). A launcher that is killed leaves ranks that end by themselves
within seconds; whoever goes on waits for them, because two sets of ranks would write one run.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.fetch.holds import claim
from fsdpq.launch.screen import Screen
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

RANKS_TIMEOUT_S = 60.0
"""Ranks notice within seconds that their launcher is gone; a slow disk may keep one longer."""

_POLL_S = 0.1


@contextmanager
def owned(files: RunFiles, *, screen: Screen) -> Generator[None, None, None]:
    """Makes this process the only launcher of a run directory until the block ends.

    Waits for ranks that a killed launcher left.

    Raises:
        UsageError: another launcher, or a rank that does not end, is at work in it.
    """
    with claim(files.root) as free:
        if not free:
            raise UsageError(
                f"the run `{files.root}` is in use: {_describe_owner(files)}",
                hint="wait until it is done, or stop it first",
            )
        _wait_for_ranks(files, screen)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        write_whole(files.launcher, (json.dumps(owner) + "\n").encode())
        yield


def _describe_owner(files: RunFiles) -> str:
    try:
        owner: dict[str, Any] = json.loads(files.launcher.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} trains it"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process trains it"


def _wait_for_ranks(files: RunFiles, screen: Screen) -> None:
    deadline, is_told = time.monotonic() + RANKS_TIMEOUT_S, False
    while files.logs.is_dir():
        with claim(files.logs) as free:
            if free:
                return
        if time.monotonic() > deadline:
            message = f"ranks of an earlier start are still at work in `{files.root}`"
            hint = f"end them: `ps` shows them as `fsdpq.worker train {files.root}`"
            raise UsageError(message, hint=hint)
        if not is_told:
            screen.report("waiting for the ranks of an earlier start to end")
            is_told = True
        time.sleep(_POLL_S)
