"""One runner at a time in a sweep directory, and no trial that is at work already.

The lock is that of a run directory (`fsdpq.launch.runs.ownership`): it ends with its process. A
runner that is killed leaves trials that save and end by themselves (`fsdpq.launch.parent`), and
ranks that do so after them; whoever goes on waits for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.fetch.holds import claim, is_held
from fsdpq.launch.runs.launcher_record import LauncherRecord, read_owner, write_owner
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.sweep_paths import SweepFiles

_POLL_S = 0.1


@contextmanager
def owned_sweep(files: SweepFiles) -> Generator[None, None, None]:
    """Makes this process the only one that runs the sweep in a directory until the block ends.

    Raises:
        UsageError: another one does.
    """
    with claim(files.root) as free:
        if not free:
            raise UsageError(
                f"the sweep `{files.root}` is in use: {_describe_owner(files)}",
                hint="wait until it is done, or stop it first",
            )
        write_owner(_owner_file(files), LauncherRecord.of_this_process())
        try:
            yield
        finally:
            _owner_file(files).unlink(missing_ok=True)


def wait_for_trial(
    files: RunFiles, *, report: Callable[[str], Any], is_over: Callable[[], bool]
) -> bool:
    """Waits until nobody is at work in a trial's run directory.

    Args:
        files: the run directory.
        report: told in one line what is waited for.
        is_over: whether to wait no longer.

    Returns:
        Whether nobody is.
    """
    is_told = False
    while is_held(files.root) or is_held(files.logs):
        if not is_told:
            report(f"waiting for trial {files.root.name} of an earlier start to save and end")
            is_told = True
        if is_over():
            return False
        time.sleep(_POLL_S)
    return True


def _owner_file(files: SweepFiles) -> Path:
    return files.root / "runner.json"


def _describe_owner(files: SweepFiles) -> str:
    owner = read_owner(_owner_file(files))
    if owner is None:
        return "another process runs it, or a task of its Slurm array"
    return f"process {owner.pid} on {owner.host} runs it"
