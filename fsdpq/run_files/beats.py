"""A rank's signs of life, as the launcher reads them: `RunFiles.heartbeat` in `fsdpq.run_files`."""

from __future__ import annotations

import struct
from dataclasses import dataclass

BEAT_LAYOUT = struct.Struct("<qqq16s16s")


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life: the content of its file, of fixed size.

    Attributes:
        pid: of the rank.
        count: one more with every sign of the same process.
        step: the step that it does, counted from 1; 0 before the first.
        phase: one of `fsdpq.run_files.rows.PHASES`, or empty before the first.
        part: what of the phase: ``data``, ``forward``, ``backward``, ``optimizer``, ``save`` of a
            step; may be empty.
    """

    pid: int = 0
    count: int = 0
    step: int = 0
    phase: str = ""
    part: str = ""

    def pack(self) -> bytes:
        """Returns it as `BEAT_LAYOUT` says."""
        return BEAT_LAYOUT.pack(
            self.pid, self.count, self.step, self.phase.encode(), self.part.encode()
        )

    @classmethod
    def unpack(cls, content: bytes) -> Beat:
        """Returns what `pack` packed."""
        pid, count, step, phase, part = BEAT_LAYOUT.unpack(content)
        return cls(pid, count, step, *(text.rstrip(b"\0").decode() for text in (phase, part)))
