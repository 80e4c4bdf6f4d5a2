"""One launcher at a time in a run directory, and none before the ranks of the last one are gone.

Both are locks of the system that end with their process (`fsdpq.fetch.holds`), so nothing stale
can be left behind by a kill: a launcher has the run directory, each rank holds its folder of logs
(`fsdpq.worker.keeping.presence`). A launcher that is killed leaves ranks that end by themselves
within seconds; whoever goes on waits for them, because two sets of ranks would write one run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from fsdpq.errors import UsageError
from fsdpq.fetch.holds import claim
from fsdpq.launch.runs.launcher_record import LauncherRecord, read_launcher, write_launcher
from fsdpq.launch.screen import Screen
from fsdpq.run_files.paths import RunFiles

RANKS_TIMEOUT_S = 60.0
"""Ranks notice within seconds that their launcher is gone; a slow disk may keep one longer."""

_POLL_S = 0.1
_LOOKS = 3


@contextmanager
def owned(files: RunFiles, *, screen: Screen) -> Generator[None, None, None]:
    """Makes this process the only launcher of a run directory until the block ends.

    Waits for ranks that a killed launcher left. How the block ends is kept in the directory, for
    `fsdpq.launch.runs.status`.

    Raises:
        UsageError: another launcher, or a rank that does not end, is at work in it.
    """
    with ExitStack() as stack:
        if not _take(files, stack):
            raise UsageError(
                f"the run `{files.root}` is in use: {_describe_owner(files)}",
                hint="wait until it is done, or stop it first",
            )
        _wait_for_ranks(files, screen)
        record = LauncherRecord.of_this_process()
        write_launcher(files, record)
        try:
            yield
        except BaseException as error:
            _write_end(files, record.ended_by(error))
            raise
        _write_end(files, record.ended_by(None))


def _take(files: RunFiles, stack: ExitStack) -> bool:
    """Claims the directory; whoever looks whether it is claimed is in the way for a moment."""
    for _ in range(_LOOKS):
        if stack.enter_context(claim(files.root)):
            return True
        stack.close()
        time.sleep(_POLL_S)
    return False


def _write_end(files: RunFiles, record: LauncherRecord) -> None:
    with contextlib.suppress(OSError):  # a disk that is full or gone: the run's own error says more
        write_launcher(files, record)


def _describe_owner(files: RunFiles) -> str:
    owner = read_launcher(files)
    if owner is None:
        return "another process trains it"
    return f"process {owner.pid} on {owner.host} trains it"


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
