"""Ending a job so that nothing is lost: its ranks save first, and it is not queued again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.slurm.files import JobFiles
from fsdpq.launch.slurm.query import JobFacts, query_jobs
from fsdpq.launch.slurm.tools import complaint, run_tool

SAVE_SIGNAL = "USR1"
"""What a job is sent before its time limit too: its ranks save and end."""

_POLL_S = 1.0


def cancel_job(
    files: JobFiles, job_id: int, *, report: Callable[[str], Any], patience_s: float
) -> bool:
    """Ends a job, or all tasks of an array; returns whether it ended by itself, or was not running.

    What waits leaves the queue. What runs is told to save, and is ended after ``patience_s``.

    Args:
        files: the job's folder.
        job_id: number of the job, or of the array.
        report: told what is being done.
        patience_s: how long its ranks may take to save.

    Raises:
        EnvironmentProblemError: there is no Slurm here, or it refuses.
    """
    files.cancelled.touch()
    phases = {facts.phase for facts in live_tasks(job_id)}
    if "queued" in phases:
        # Beside tasks that run only what waits: the rest is to save.
        _scancel(job_id, *(["--state=PENDING"] if "running" in phases else []))
        report(f"job {job_id} is out of the queue")
    if "running" not in phases:
        return True
    _scancel(job_id, f"--signal={SAVE_SIGNAL}")
    report(f"job {job_id} is told to save and end")
    deadline = time.monotonic() + patience_s
    while live_tasks(job_id):
        if time.monotonic() > deadline:
            report(f"job {job_id} has not ended within {patience_s:.0f} s: ending it")
            _scancel(job_id)
            return False
        time.sleep(_POLL_S)
    return True


def live_tasks(job_id: int) -> list[JobFacts]:
    """Returns what waits or runs of a job, or of an array.

    Raises:
        EnvironmentProblemError: there is no Slurm here, or it gives no answer.
    """
    return [facts for facts in query_jobs([job_id]) if facts.phase in ("queued", "running")]


def _scancel(job_id: int, *options: str) -> None:
    done = run_tool(["scancel", *options, str(job_id)])
    if done.returncode != 0:
        hint = f"look with `squeue --jobs={job_id}`"
        raise EnvironmentProblemError(f"Slurm does not end the job: {complaint(done)}", hint=hint)
