"""Memory of this rank by phase: device memory on a GPU, resident memory on a CPU.

A peak belongs to its phase: what counts the highest value so far is set back as a phase begins, the
allocator's counter of CUDA, and on Linux ``VmHWM`` by a 5 in ``/proc/self/clear_refs``. Where the
system does not allow that, a phase's peak is the highest of the process so far.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from fsdpq.metrics.peaks import STATUS, read_status, reset_host_peak
from fsdpq.protocols import MetricSink

RUSAGE_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""``ru_maxrss`` is in KiB on Linux and in bytes on macOS."""

MEASURED_STEPS = 2
"""Steps whose memory is always written: the optimizer's states exist from the second on."""


@dataclass(frozen=True)
class Use:
    """Memory in use.

    Attributes:
        now: at this moment.
        peak: the most since the phase began.
        anonymous: that part of ``now`` which no file is behind; on a GPU the same as ``now``.
    """

    now: int
    peak: int
    anonymous: int


def measure(device: torch.device) -> Use:
    """Returns the memory of this process on ``device``."""
    if device.type == "cuda":
        now = torch.cuda.memory_allocated(device)
        return Use(now, torch.cuda.max_memory_allocated(device), now)
    return measure_host()


def measure_host() -> Use:
    """Returns the resident memory of this process."""
    if not STATUS.exists():
        now = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT_BYTES
        return Use(now, peak, now)
    return Use(*read_status("VmRSS", "VmHWM", "RssAnon"))


def current_bytes(device: torch.device) -> int:
    """Memory in use now."""
    return measure(device).now


class MemoryLog:
    """Writes a ``memory`` row as each phase ends: called with the phase's name.

    Args:
        metrics: takes the rows.
        device: whose memory.
        every_step: write the memory of all steps, not only of the first ones.
    """

    def __init__(
        self, metrics: MetricSink, device: torch.device, *, every_step: bool = False
    ) -> None:
        self._metrics = metrics
        self._device = device
        self._every_step = every_step
        self._num_steps = 0
        self._of_step: dict[str, int] = {}
        self._rows_of_step: dict[str, dict[str, Any]] = {}
        self._highest = 0
        self._host_highest = 0

    def __call__(self, phase: str) -> None:
        """Writes one row, and begins the next phase; within a step rows wait for its end.

        A row holds what is in use, the most within the phase, on a GPU also the most that torch
        reserved, and on a CPU that part of what is in use which no file is behind.
        """
        use = measure(self._device)
        row: dict[str, Any] = {"event": "memory", "phase": phase, **self._of_step}
        row |= {"bytes": use.now, "peak_bytes": use.peak}
        if self._device.type == "cuda":
            row["reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        else:
            row["anonymous_bytes"] = use.anonymous
        if self._of_step:
            most = self._rows_of_step.get(phase, row)
            self._rows_of_step[phase] = max(row, most, key=lambda each: each["peak_bytes"])
        else:
            self._metrics.write(row)
        self.begin()

    def begin(self) -> None:
        """Begins a phase: what was used before counts for the whole run only."""
        self._highest = max(self._highest, measure(self._device).peak)
        self._host_highest = max(self._host_highest, measure_host().peak)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _forget_peak()

    def begin_step(self, number: int) -> bool:
        """Begins step ``number``, counted from 1; whether its memory is to be written."""
        self._num_steps += 1
        if self._num_steps > MEASURED_STEPS and not self._every_step:
            return False
        self._of_step = {"step": number}
        self.begin()
        return True

    def end_step(self, held: dict[str, dict[str, int]], *, tokens: int) -> None:
        """Writes one row a phase, of micro-batches that with the highest peak, and what is held.

        Args:
            held: place -> category -> bytes, of rank 0 (`fsdpq.metrics.held`).
            tokens: of the largest micro-batch of the step, padding included.
        """
        for row in self._rows_of_step.values():
            self._metrics.write(row)
        self._rows_of_step = {}
        self._metrics.write({"event": "held", **self._of_step, **held, "tokens": tokens})

    @property
    def highest(self) -> int:
        """The most of the whole run."""
        return max(self._highest, measure(self._device).peak)

    @property
    def host_highest(self) -> int:
        """The most resident memory of this process in the whole run."""
        return max(self._host_highest, measure_host().peak)


def _forget_peak() -> None:
    """Sets the highest resident memory of this process back to what it is now."""
    try:
        reset_host_peak()
    except OSError:
        return  # not Linux, or /proc is read-only: the peak stays that of the process so far
