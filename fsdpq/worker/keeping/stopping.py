"""Deciding, all ranks together, that a run saves and ends.

One rank hears of it first: by a signal of its own, or rank 0 by the file that the launcher wrote.
After every step all ranks ask each other, in one reduction of two numbers on the host.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fsdpq.dist import rank, world_size
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.keeping.signals import received_signal

LOOK_S = 0.2
"""Time between two looks at the launcher's file: the directory may be across a network."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after they asked each other.

    Attributes:
        stop: name of the signal for which the run is to end, empty where it goes on.
        due: a rank found something due.
    """

    stop: str
    due: bool


class StopWatch:
    """Tells all ranks at the same step that the run is to end.

    Args:
        files: the run directory.
    """

    def __init__(self, files: RunFiles) -> None:
        self._request = files.stop_request
        self._next_look = 0.0
        self._heard = 0
        self.agreed = ""

    def ask(self, *, due: bool = False) -> Agreed:
        """Asks all ranks whether to end, and whether something is due.

        Ranks: all (collective).

        Args:
            due: something is, as this rank sees it.
        """
        self._heard = self._heard or self._listen()
        flags = torch.tensor([self._heard, due], dtype=torch.int32)
        if world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, is_due = flags.tolist()
        self._heard = number
        self.agreed = signal.Signals(number).name if number else ""
        return Agreed(self.agreed, bool(is_due))

    def _listen(self) -> int:
        """Returns the number of a signal that this rank knows of, 0 without one."""
        name = received_signal()
        if not name and rank() == 0 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            name = self._read_request()
        return int(getattr(signal, name, 0)) if name else 0

    def _read_request(self) -> str:
        try:
            return self._request.read_text().strip()
        except OSError:  # not there: nobody asks
            return ""
