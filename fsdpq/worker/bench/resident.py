"""Memory in use now and at most, by phase: of the process on a CPU, of the device on a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Use:
    """Memory at the end of a phase, and the most within it, in bytes.

    Attributes:
        now: resident memory of the process, or what the device's allocator holds.
        peak: the most since the phase began.
        anonymous: that part of ``now`` which no file is behind; on a GPU the same as ``now``.
    """

    now: int
    peak: int
    anonymous: int


class Resident:
    """Measures each phase; Linux or a GPU.

    Args:
        device: whose memory.

    Attributes:
        phases: by name; of a name that repeats, the one with the higher peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, Use] = {}
        self._begin()

    def end_phase(self, name: str) -> None:
        """Ends a phase and begins the next."""
        use = self._measure()
        if name not in self.phases or self.phases[name].peak < use.peak:
            self.phases[name] = use
        self._begin()

    def as_dict(self) -> dict[str, Any]:
        """Returns the phases for JSON."""
        return {name: asdict(use) for name, use in self.phases.items()}

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS

    def _measure(self) -> Use:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            now = torch.cuda.memory_allocated(self.device)
            return Use(now, torch.cuda.max_memory_allocated(self.device), now)
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        now, peak, anonymous = (
            1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon")
        )
        return Use(now, peak, anonymous)
