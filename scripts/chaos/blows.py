"""Blows: at which moment of a run which of its processes gets which signal."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fsdpq.run_files.paths import RunFiles

POLL_S = 0.002
"""Writing a small checkpoint takes some tens of milliseconds."""

MOMENTS = ("write",) * 3 + ("steps",) * 2 + ("time",) * 3 + ("load", "eval", "export")
"""Drawn from, with these weights."""

VICTIMS = ("rank 0", "rank 1", "torchrun", "launcher", "everything", "launcher and rank 0")
SAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals on which a run saves and ends."""


@dataclass(frozen=True)
class Blow:
    """One blow.

    Attributes:
        moment: what is waited for: ``write`` (a checkpoint is being written), ``steps`` (some more
            steps are done), ``time`` (after the command's start), or a phase of the run.
        count: so many writes or steps are let pass.
        delay_s: after the moment.
        victim: who is hit; for a saving signal the launcher.
        number: of the signal.
    """

    moment: str
    count: int
    delay_s: float
    victim: str
    number: int

    @property
    def kind(self) -> str:
        """Who got what, for the table."""
        return f"{signal.Signals(self.number).name} {self.victim}"


@dataclass(frozen=True)
class Struck:
    """A blow that fell.

    Attributes:
        blow: what it was.
        phase: of the run at that time, ``start`` before the ranks tell any.
        step: steps that were logged.
        writing: whether a checkpoint was being written.
        fell: False where the run had ended before.
    """

    blow: Blow
    phase: str
    step: int
    writing: bool
    fell: bool = True


def draw(rng: random.Random, *, saving_share: float = 0.15, two_ranks: bool = True) -> Blow:
    """Draws a blow."""
    moment = rng.choice(MOMENTS)
    delays = {"write": 0.03, "steps": 0.2, "time": 8.0, "load": 0.5, "eval": 0.2, "export": 0.3}
    count = rng.randint(1, 8) if moment in ("write", "steps") else 0
    delay_s = rng.uniform(0, delays[moment])
    if rng.random() < saving_share and moment in ("write", "steps", "eval"):
        return Blow(moment, count, delay_s, "launcher", rng.choice(SAVING))
    victims = VICTIMS if two_ranks else [name for name in VICTIMS if name != "rank 1"]
    return Blow(moment, count, delay_s, rng.choice(victims), signal.SIGKILL)


def strike(launcher: subprocess.Popen[bytes], files: RunFiles, blow: Blow) -> Struck:
    """Waits for the moment of a blow and hits; returns what was hit, and when in the run."""
    watch = _Watch(launcher, files)
    reached = {
        "write": lambda: watch.writes >= blow.count,
        "steps": lambda: watch.new_steps >= blow.count,
        "time": lambda: True,
    }.get(blow.moment, lambda: blow.moment in watch.phases)
    if not watch.until(reached) or not _sleep(launcher, blow.delay_s):
        return watch.struck(blow, fell=False)
    targets = list(_targets(launcher, blow.victim))
    if not targets:  # not started yet, or just gone: the launcher is there always
        blow = replace(blow, victim="launcher")
        targets = list(_targets(launcher, blow.victim))
    struck = watch.struck(blow, fell=bool(targets))
    for process in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(blow.number)
    return struck


def ranks_of(files: RunFiles) -> list[psutil.Process]:
    """Returns every process of a run that lives, whoever its parent is: torchrun and ranks."""
    return [process for process in psutil.process_iter() if _is_worker(process, files.root)]


class _Watch:
    """Follows a run from its files, without disturbing it."""

    def __init__(self, launcher: subprocess.Popen[bytes], files: RunFiles) -> None:
        self._launcher = launcher
        self._files = files
        self._first_event = files.events.stat().st_size if files.events.exists() else 0
        self._first_step = self._last_step()
        self._draft_before = False
        self._next_look = 0.0
        self.writes = 0
        self.new_steps = 0
        self.phases = ["start"]

    def until(self, reached: Callable[[], bool]) -> bool:
        """Waits; returns False where the launcher ends before."""
        while self._launcher.poll() is None:
            self._look()
            if reached():
                return True
            time.sleep(POLL_S)
        return False

    def struck(self, blow: Blow, *, fell: bool) -> Struck:
        """Returns the blow with what the run was at."""
        self._next_look = 0.0
        self._look()
        return Struck(blow, self.phases[-1], self._last_step(), self._has_draft(), fell)

    def _look(self) -> None:
        has_draft = self._has_draft()
        self.writes += has_draft and not self._draft_before
        self._draft_before = has_draft
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 0.02
        self.new_steps = self._last_step() - self._first_step
        rows = _rows(self._files.events, self._first_event)
        self.phases = ["start", *(row["name"] for row in rows if row.get("event") == "phase")]

    def _has_draft(self) -> bool:
        with contextlib.suppress(OSError):
            folder = self._files.checkpoints
            return any(path.name.startswith(".step-") for path in folder.iterdir())
        return False

    def _last_step(self) -> int:
        size = self._files.metrics.stat().st_size if self._files.metrics.exists() else 0
        rows = _rows(self._files.metrics, max(0, size - 4096))
        return max((row["step"] for row in rows if row.get("event") == "step"), default=0)


def _rows(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """Yields the whole rows of a file from byte ``start`` on; a row that it cuts is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _sleep(launcher: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(timeout=max(seconds, 1e-4))
        return False
    return True


def _targets(launcher: subprocess.Popen[bytes], victim: str) -> Iterator[psutil.Process]:
    """Yields the processes that a blow hits, the launcher first: it must not tidy up."""
    try:
        itself = psutil.Process(launcher.pid)
        below = itself.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if "launcher" in victim or victim == "everything":
        yield itself
    for process in below:
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            is_torchrun = "torch.distributed.run" in command
            rank = process.environ().get("RANK") if "fsdpq.worker" in command else None
            names = ("torchrun",) if is_torchrun else (f"rank {rank}",)
            if victim == "everything" or any(name in victim for name in names):
                yield process


def _is_worker(process: psutil.Process, root: Path) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "fsdpq.worker" in command and str(root) in command
