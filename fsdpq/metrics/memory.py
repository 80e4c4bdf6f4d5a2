"""Memory of this rank: device memory on a GPU, resident memory on a CPU."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import psutil
import torch

from fsdpq.protocols import MetricSink

RUSAGE_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""``ru_maxrss`` is in KiB on Linux and in bytes on macOS."""


def current_bytes(device: torch.device) -> int:
    """Memory in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT_BYTES


@dataclass(frozen=True)
class MemoryLog:
    """Writes a ``memory`` row as each phase ends: called with the phase's name.

    Attributes:
        metrics: takes the rows.
        device: whose memory.
        enabled: False writes nothing.
    """

    metrics: MetricSink
    device: torch.device
    enabled: bool

    def __call__(self, phase: str) -> None:
        """Writes one row: memory in use, the largest so far, and on a GPU what torch reserved."""
        if not self.enabled:
            return
        row = {"event": "memory", "phase": phase, "bytes": current_bytes(self.device)}
        row["peak_bytes"] = peak_bytes(self.device)
        if self.device.type == "cuda":
            row["reserved_bytes"] = torch.cuda.memory_reserved(self.device)
        self.metrics.write(row)
