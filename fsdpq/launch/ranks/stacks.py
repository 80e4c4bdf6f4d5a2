"""Asking ranks where they are: the stacks of all threads, and what the system says of a process.

A rank answers SIGUSR2 with its stacks (`fsdpq.worker.keeping.signals`), also while C code holds the
GIL. One that is stopped, or waits for a disk inside the kernel, cannot answer.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fsdpq.run_files.paths import RunFiles

ANSWER_S = 5.0
"""Time that the ranks get to write their stacks: it takes milliseconds where they can."""

_QUIET_S = 0.3
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<path>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
_OUTERMOST = ("<module>", "_run_module_as_main")
_STATES = {
    psutil.STATUS_STOPPED: "it is stopped (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "a debugger holds it",
    psutil.STATUS_DISK_SLEEP: "it waits for a disk inside the kernel",
    psutil.STATUS_ZOMBIE: "it has ended, and torchrun did not notice",
}


@dataclass(frozen=True)
class Frame:
    """One call of a stack."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        """Returns function and place."""
        return f"`{self.function}` ({self.path}:{self.line})"


@dataclass(frozen=True)
class RankStack:
    """Where a rank is.

    Attributes:
        state: what the system says of the process where that is why it does not answer, or empty.
        frames: of its main thread, the innermost first; none where it did not answer.
    """

    state: str
    frames: tuple[Frame, ...]

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return any("torch/distributed/" in frame.path for frame in self.frames[:4])

    @property
    def place(self) -> str:
        """Returns where it is, in words."""
        if self.state:
            return self.state
        if not self.frames:
            return "it does not answer"
        place = str(self.frames[0])
        ours = next((f for f in self.frames if "/fsdpq/" in f.path), None)
        if "site-packages" in self.frames[0].path and ours is not None and ours != self.frames[0]:
            place += f", called from {ours}"
        return place


def ask_stacks(files: RunFiles, pids: Mapping[int, int]) -> dict[int, RankStack]:
    """Returns where ranks are, by rank; each appends its stacks to `RunFiles.rank_stack`.

    Args:
        files: the run directory.
        pids: process ids by rank.
    """
    states = {rank: _state(pid) for rank, pid in pids.items()}
    sizes = {rank: _size(files.rank_stack(rank)) for rank in pids}
    asked = [rank for rank, pid in pids.items() if not states[rank] and _ask(pid)]
    _wait_for_answers([files.rank_stack(rank) for rank in asked], [sizes[r] for r in asked])
    return {
        rank: RankStack(states[rank], _main_frames(_read(files.rank_stack(rank), sizes[rank])))
        for rank in pids
    }


def _state(pid: int) -> str:
    try:
        return _STATES.get(psutil.Process(pid).status(), "")
    except psutil.NoSuchProcess:
        return "it is gone"


def _ask(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGUSR2)
    except ProcessLookupError:
        return False
    return True


def _wait_for_answers(paths: Sequence[Path], sizes: Sequence[int]) -> None:
    """Returns once every file has grown and none grows any more, or after `ANSWER_S`."""
    deadline, before, quiet_since = time.monotonic() + ANSWER_S, list(sizes), time.monotonic()
    while time.monotonic() < deadline:
        now = [_size(path) for path in paths]
        if now != before:
            before, quiet_since = now, time.monotonic()
        all_answered = all(size > old for size, old in zip(now, sizes, strict=True))
        if all_answered and time.monotonic() - quiet_since > _QUIET_S:
            return
        time.sleep(0.05)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _main_frames(dump: str) -> tuple[Frame, ...]:
    """Returns the frames of the main thread: the one whose outermost call is the program's."""
    for thread in _THREAD.split(dump)[1:]:
        frames = tuple(
            Frame(match["path"], int(match["line"]), match["function"])
            for match in _FRAME.finditer(thread)
        )
        if frames and frames[-1].function in _OUTERMOST:
            return frames
    return ()
