"""Signs of life of a rank, for the launcher (`fsdpq.launch.ranks.watch`).

They are written by the thread that trains, so that one that is stuck gives none, into a mapped
file: about two microseconds each, no system call, and no disk that has to answer.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from fsdpq.run_files.beats import BEAT_LAYOUT, Beat


class Heartbeat:
    """The heartbeat of this rank.

    Attributes:
        phase: the one that goes on, empty before the first.
        part: what goes on of it, may be empty.
        step: the one that it belongs to, 0 before the first.

    Args:
        path: its file; it is made, or taken over from an earlier attempt of the same rank.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A page of a file that has no place on the disk would end the rank when it is written.
            os.pwrite(descriptor, bytes(BEAT_LAYOUT.size), 0)
            self._file = mmap.mmap(descriptor, BEAT_LAYOUT.size)
        finally:
            os.close(descriptor)
        self._count = 0
        self.step = 0
        self.phase = self.part = ""
        self._write()

    def enter(self, phase: str) -> None:
        """Says that a phase of the run begins."""
        self.phase, self.part = phase, ""
        self._write()

    def beat_again(self) -> None:
        """Says that the part goes on."""
        self._write()

    def beat(self, part: str, step: int | None = None) -> None:
        """Says that a part of the phase begins.

        Args:
            part: at most 16 bytes.
            step: the one that it belongs to, from 1; None is the one before.
        """
        self.step = self.step if step is None else step
        self.part = part
        self._write()

    def _write(self) -> None:
        self._count += 1
        beat = Beat(os.getpid(), self._count, self.step, self.phase, self.part)
        self._file[:] = beat.pack()
