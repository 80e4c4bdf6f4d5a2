"""What torch's allocators hand out and take back: peaks, phases, and the size of each piece.

On a CPU torch's profiler reports every allocation, those inside operators of other libraries too,
which a ``TorchDispatchMode`` does not see. Files that are mapped count with their size, when they
are mapped. Only the host's allocations are counted: a GPU's allocator keeps its peak itself.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASE = "end of phase "


@dataclass(frozen=True)
class Allocation:
    """One event: bytes handed out (positive) or taken back, and the microsecond it happened at."""

    time_us: float
    num_bytes: int


class Allocations:
    """Records every allocation on the host inside ``with``.

    Attributes:
        events: in the order of time.
        phases: names given to `end_phase`, and when.
        operators: names of all operators that ran, and when they began.
    """

    def __enter__(self) -> Allocations:
        gc.collect()  # what was left before must not be given back meanwhile
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        trace.sort(key=lambda event: event.get("ts", 0))
        # Device type 0 is the host.
        self.events = [
            Allocation(event["ts"], int(event["args"]["Bytes"]))
            for event in trace
            if event["name"] == "[memory]" and event["args"].get("Device Type", 0) == 0
        ]
        self.phases = [
            (event["name"].removeprefix(PHASE), event["ts"])
            for event in trace
            if event.get("cat") == "user_annotation" and event["name"].startswith(PHASE)
        ]
        self.operators = [
            (event["name"], event["ts"]) for event in trace if event.get("cat") == "cpu_op"
        ]

    def end_phase(self, name: str) -> None:
        """Marks that a phase ends now."""
        with record_function(f"{PHASE}{name}"):
            pass

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once of what was allocated since the start."""
        return max(itertools.accumulate(event.num_bytes for event in self.events), default=0)

    @property
    def largest_bytes(self) -> int:
        """The largest single allocation."""
        return max((event.num_bytes for event in self.events), default=0)

    def phase_peaks(self) -> dict[str, int]:
        """The most that was held at once within each phase; of a name that repeats, the most."""
        peaks: dict[str, int] = {}
        held, names = 0, iter(self.phases)
        name, end = next(names, ("", float("inf")))
        for event in self.events:
            while event.time_us > end:
                name, end = next(names, ("", float("inf")))
                peaks[name] = max(peaks.get(name, 0), held)
            held += event.num_bytes
            peaks[name] = max(peaks.get(name, 0), held)
        return peaks


@dataclass(frozen=True)
class Fit:
    """Peaks of activation memory over the sequence length, and a straight line through them.

    Attributes:
        peaks: bytes at each of the lengths.
        base_bytes: where the line starts.
        token_bytes: its slope.
        r_squared: the share of the variance that the line explains.
        quadratic_share: of the peak at the longest sequence, in a fit with a quadratic term.
    """

    peaks: tuple[int, ...]
    base_bytes: float
    token_bytes: float
    r_squared: float
    quadratic_share: float


def fit_line(lengths: Sequence[int], peaks: Sequence[int]) -> Fit:
    """Returns the least-squares fit of ``peaks`` to ``lengths``; at least four of each."""
    n, y = torch.tensor(lengths).double(), torch.tensor(peaks).double()
    line = torch.linalg.lstsq(torch.stack([torch.ones_like(n), n], dim=1), y[:, None]).solution
    scaled = n / n.max()
    curve = torch.stack([torch.ones_like(n), scaled, scaled**2], dim=1)
    quadratic = torch.linalg.lstsq(curve, y[:, None]).solution[2, 0]
    base, slope = line.flatten().tolist()
    rest = ((y - base - slope * n) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    share = float(quadratic) / peaks[-1]
    return Fit(tuple(peaks), base, slope, 1 - float(rest), share)
