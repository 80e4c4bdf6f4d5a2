"""The questions of lm-evaluation-harness, brought to this machine before the ranks start.

The ranks have no network. One process, which has, loads the tasks once: `datasets` keeps what it
downloads in its own cache, where the ranks find it. No code of a dataset runs (`datasets` 5 has no
such thing), and metrics that would be downloaded as code are refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fsdpq.errors import FsdpqError
from fsdpq.launch.ranks.single_worker import WorkerFiles, run_single_worker
from fsdpq.launch.screen import Screen

FETCHER = ("-m", "fsdpq.worker", "harness-data")


def fetch_task_data(
    tasks: Sequence[str],
    include_path: Path | None = None,
    *,
    screen: Screen,
    worker: Sequence[str] = FETCHER,
) -> None:
    """Checks the names of tasks and downloads their questions where they are not here yet.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: folder of more tasks, None for none.
        screen: shows what happens.
        worker: arguments of Python that name the worker.

    Raises:
        RecipeError: the harness has no such task.
        FsdpqError: the questions cannot be had.
    """
    screen.report(f"looking for the questions of {', '.join(tasks)}")
    work = Path(tempfile.mkdtemp(prefix="fsdpq-tasks-"))
    files = WorkerFiles(work / "out", work / "log", work / "error.json")
    arguments = [*worker, f"--error={files.error}", *(f"--task={name}" for name in tasks)]
    arguments += [] if include_path is None else [f"--include-path={include_path.absolute()}"]
    try:
        told = run_single_worker(arguments, files, network=True)
    except FsdpqError as error:
        if not error.details:  # an explained one; else its log is of use
            shutil.rmtree(work, ignore_errors=True)
        raise
    screen.report(told)
    shutil.rmtree(work, ignore_errors=True)
