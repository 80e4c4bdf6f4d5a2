"""Memory in use now and at most, by phase: of the process on a CPU, of the device on a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fsdpq.metrics.memory import Use, measure
from fsdpq.metrics.peaks import reset_host_peak, synchronize


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
            reset_host_peak()

    def _measure(self) -> Use:
        synchronize(self.device)
        return measure(self.device)
