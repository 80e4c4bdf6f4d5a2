"""The flow of ``fsdpq cancel``: end a run wherever it is, saved where it has something to save."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import time
from pathlib import Path

import psutil

from fsdpq.errors import LaunchError, UsageError
from fsdpq.launch.ranks.keeper import resume_hint
from fsdpq.launch.runs.launcher_record import LauncherRecord, read_launcher
from fsdpq.launch.runs.status import RunStatus, read_status
from fsdpq.launch.screen import Screen
from fsdpq.launch.slurm.cancel import cancel_job, live_tasks
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.run_jobs import jobs_of
from fsdpq.run_files.paths import RunFiles

PATIENCE_S = 300.0
"""How long ranks may take to save: a full model on a slow disk takes minutes."""

_POLL_S = 0.2


def cancel_run(files: RunFiles, *, screen: Screen, patience_s: float = PATIENCE_S) -> str:
    """Ends a run and returns what became of it, in a sentence.

    A job of Slurm leaves the queue, or its ranks save and end. A launcher of this machine is sent
    SIGTERM, which does the same.

    Args:
        files: the run directory.
        screen: shows what happens.
        patience_s: how long it may take; a job is ended then, a launcher of this machine goes on.

    Raises:
        UsageError: nothing is at work there, or it is another machine's.
        LaunchError: it has not ended in time.
        EnvironmentProblemError: there is no Slurm here, or it gives no answer.
    """
    job_files = JobFiles.of(files.root)
    record = read_record(job_files)
    if record is not None and live_tasks(record.id):
        cancel_job(job_files, record.id, report=screen.report, patience_s=patience_s)
        return _outcome(files)
    status = read_status(files, with_size=False)
    launcher = read_launcher(files)
    if not status.is_active or launcher is None:
        hint = f"`fsdpq status {shlex.quote(str(files.root))}` says more"
        raise UsageError(f"nothing is at work in `{files.root}`: it is {status.state}", hint=hint)
    _end_launcher(files, launcher, screen, patience_s)
    return _outcome(files)


def cancel_array(directory: Path, *, screen: Screen, patience_s: float = PATIENCE_S) -> str:
    """Ends all tasks of the job array of a sweep, and returns what became of them, in a sentence.

    Args:
        directory: of the sweep.
        screen: shows what happens.
        patience_s: how long trials may take to save.

    Raises:
        UsageError: the sweep has no job, or none of its tasks waits or runs.
        EnvironmentProblemError: there is no Slurm here, or it gives no answer.
    """
    files = JobFiles.of(directory)
    record = read_record(files)
    if record is None or not (alive := live_tasks(record.id)):
        hint = f"`fsdpq sweep {shlex.quote(str(directory))}` shows how its trials stand"
        raise UsageError(f"no job of `{directory}` waits or runs", hint=hint)
    cancel_job(files, record.id, report=screen.report, patience_s=patience_s)
    tasks = "1 task" if len(alive) == 1 else f"{len(alive)} tasks"
    return f"`{directory}`: {tasks} of job {record.id} ended; the sweep goes on from what is saved"


def _end_launcher(
    files: RunFiles, launcher: LauncherRecord, screen: Screen, patience_s: float
) -> None:
    if launcher.host != socket.gethostname():
        message = f"process {launcher.pid} on {launcher.host} trains `{files.root}`"
        raise UsageError(message, hint=f"give the command on {launcher.host}")
    try:
        process = psutil.Process(launcher.pid)
        os.kill(launcher.pid, signal.SIGTERM)
    except (psutil.Error, OSError):
        return  # it has just ended
    screen.report(f"process {launcher.pid} is told to save and end")
    deadline = time.monotonic() + patience_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            message = f"process {launcher.pid} has not ended within {patience_s:.0f} s"
            raise LaunchError(message, hint="it may be saving still: `fsdpq status` tells")
        time.sleep(_POLL_S)


def _outcome(files: RunFiles) -> str:
    status: RunStatus = read_status(files, job_of=jobs_of([files]), with_size=False)
    total = f" of {status.total_steps}" if status.total_steps else ""
    if status.state == "finished":
        return f"`{files.root}` has finished meanwhile"
    if status.saved_step is not None:
        return f"`{files.root}` ended after step {status.step}{total}; {resume_hint(files)}"
    return f"`{files.root}` ended, and there is no checkpoint"
