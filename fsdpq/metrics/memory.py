"""Memory of this rank: device memory on a GPU, resident memory on a CPU."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

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
