"""How a run stands, from the files in its directory: what ``runs ls`` and ``status`` show.

A launcher holds a lock of the system on the directory while it works (`ownership`), and leaves how
it ended. One that was killed leaves nothing: then the rows of the ranks and their errors tell. On a
file system without such locks a run of this machine is told by its process, one of another machine
by its silence.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from fsdpq.errors import ExitCode
from fsdpq.fetch.holds import is_claimed
from fsdpq.launch.ranks.failure import read_rank_errors
from fsdpq.launch.runs.launcher_record import LauncherRecord, read_launcher
from fsdpq.launch.runs.row_scan import Progress, scan_rows
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, step_of

State = Literal["queued", "starting", "running", "finished", "failed", "saved", "stopped", "lost"]
"""``saved`` was stopped and can go on; ``stopped`` has no checkpoint; ``lost`` says it runs and
has no process; ``queued`` waits in Slurm's queue."""

ACTIVE: frozenset[State] = frozenset({"queued", "starting", "running"})
"""A run that will write more by itself."""

SILENCE_S = 600.0
"""After which a launcher of another machine, whose lock cannot be seen, counts as gone."""

_NEW_S = 30.0
"""A directory without a launcher is that of a run about to start, for so long."""


@dataclass(frozen=True)
class RunJob:
    """What a scheduler knows of a run.

    Attributes:
        where: which job, in words: ``Slurm job 17 on node3``.
        waits: it is in the queue, for the first time or again.
        runs: it is at work.
        error: how it ended, in a line; says something where the run never started.
    """

    where: str
    waits: bool = False
    runs: bool = False
    error: str = ""


JobOf = Callable[[RunFiles], RunJob | None]
"""Returns the job of a run, None where it has none."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        root: its directory.
        name: of the recipe.
        state: see `State`.
        step: the last one that was logged, 0 before the first.
        total_steps: None where that is not known yet.
        train_loss: the last one that was logged.
        eval_loss: the last held-out loss.
        best_eval_loss: the lowest one.
        num_bytes: of all files of the directory.
        started: seconds since the epoch.
        updated: when it last wrote a row.
        where: host and process, or Slurm job, that has it; empty where nobody has.
        error: one line for what ended it, else empty.
        phase: the last one that began (`fsdpq.run_files.rows.PHASES`), empty before the first.
        saved_step: of the newest checkpoint, None without one.
        exit_code: of the launcher that ended last, None where it was killed or is at work.
    """

    root: Path
    name: str
    state: State
    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    num_bytes: int = 0
    started: float | None = None
    updated: float | None = None
    where: str = ""
    error: str = ""
    phase: str = ""
    saved_step: int | None = None
    exit_code: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether the run will write more by itself."""
        return self.state in ACTIVE

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self) | {"root": str(self.root)}


def read_status(
    files: RunFiles, *, job_of: JobOf | None = None, with_size: bool = True
) -> RunStatus:
    """Returns how a run stands.

    Args:
        files: of the run; nothing but its directory need be there.
        job_of: asks a scheduler; None asks nobody.
        with_size: False leaves ``num_bytes`` at 0: a run with many files is read faster.
    """
    job = job_of(files) if job_of is not None else None  # first: what it ends leaves its files
    launcher = read_launcher(files)
    done = scan_rows(files, since=launcher.time if launcher else 0.0)
    checkpoints = list_checkpoints(files.checkpoints)
    state, error = _read_state(files, launcher, done, job, can_go_on=bool(checkpoints))
    ended = launcher.ended if launcher is not None else None
    at_work = state in ("starting", "running")
    if not (at_work or ended) and read_launcher(files) != launcher:  # it ended while this looked
        return read_status(files, job_of=job_of, with_size=with_size)
    return RunStatus(
        files.root,
        _read_name(files),
        state,
        step=done.step,
        total_steps=done.total_steps,
        train_loss=done.train_loss,
        eval_loss=done.eval_loss,
        best_eval_loss=done.best_eval_loss,
        num_bytes=_count_bytes(files.root) if with_size else 0,
        started=done.first_time or (launcher.time if launcher else _made(files)),
        updated=max((moment for moment in (done.last_time, ended) if moment), default=None),
        where=_where(launcher, job) if at_work or state == "queued" else "",
        error=error,
        phase=done.phase,
        saved_step=step_of(checkpoints[0]) if checkpoints else None,
        exit_code=launcher.exit_code if launcher is not None and not at_work else None,
    )


def _read_state(
    files: RunFiles,
    launcher: LauncherRecord | None,
    done: Progress,
    job: RunJob | None,
    *,
    can_go_on: bool,
) -> tuple[State, str]:
    if (job is not None and job.runs) or _has_launcher(files, launcher, done):
        return ("running" if done.phases - {"data", "load", "quantize"} else "starting"), ""
    if job is not None and job.waits:
        return "queued", ""
    if launcher is not None and launcher.exit_code is not None:
        return _ended_state(launcher, can_go_on=can_go_on)
    if done.end.get("event") == "done":
        return "finished", ""
    if done.end.get("event") == "stopped":
        return ("saved" if can_go_on else "stopped"), f"stopped after step {done.end['step']}"
    if errors := read_rank_errors(files):
        return "failed", errors[0].message.strip().partition("\n")[0]
    if launcher is None and job is not None and job.error:
        return "failed", job.error
    if launcher is None and not done.last_time and time.time() - (_made(files) or 0.0) < _NEW_S:
        return "starting", ""
    return "lost", "its launcher was killed, or its machine went down"


def _ended_state(launcher: LauncherRecord, *, can_go_on: bool) -> tuple[State, str]:
    if launcher.exit_code == ExitCode.OK:
        return "finished", ""
    if launcher.exit_code in (ExitCode.SAVED, ExitCode.INTERRUPTED):
        return ("saved" if can_go_on else "stopped"), launcher.error
    return "failed", launcher.error


def _has_launcher(files: RunFiles, launcher: LauncherRecord | None, done: Progress) -> bool:
    if is_claimed(files.root):
        return True
    if launcher is None or launcher.ended is not None:
        return False
    if launcher.host != socket.gethostname():
        return time.time() - max(launcher.time, done.last_time or 0.0) < SILENCE_S
    try:
        return psutil.Process(launcher.pid).create_time() <= launcher.time
    except psutil.Error:
        return False


def _where(launcher: LauncherRecord | None, job: RunJob | None) -> str:
    if job is not None:
        return job.where
    return f"process {launcher.pid} on {launcher.host}" if launcher is not None else ""


def _read_name(files: RunFiles) -> str:
    """Reads one line of the recipe: all of it would take most of the time of a list."""
    try:
        with files.resolved.open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("name:"):
                    return line.partition(":")[2].strip().strip("'\"")
    except (OSError, ValueError):
        return files.root.name
    return files.root.name


def _made(files: RunFiles) -> float | None:
    try:
        return files.root.stat().st_mtime
    except OSError:
        return None


def _count_bytes(folder: str | Path) -> int:
    """Adds up the files under a folder; what is removed meanwhile counts nothing."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += _count_bytes(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total
