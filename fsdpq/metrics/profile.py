"""torch's profiler around some steps: one Chrome trace a rank (chrome://tracing, perfetto.dev)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fsdpq.recipe.sections.output import ProfileOptions


class StepProfiler:
    """Traces the steps that a recipe asks for.

    Args:
        options: which steps.
        path: where this rank's trace goes.
        device: a GPU's kernels are traced too.
    """

    def __init__(self, options: ProfileOptions, path: Path, device: torch.device) -> None:
        self.first = options.start_step
        self.last = options.start_step + options.num_steps - 1
        self.path = path
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._running = False

    @contextmanager
    def tracing(self, step: int) -> Iterator[None]:
        """Runs one step, traced where it is one of those; writes the file after the last of them.

        Args:
            step: counted from 1.
        """
        if step == self.first:
            self._profile.start()
            self._running = True
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step == self.last:
            self.finish()

    def finish(self) -> None:
        """Ends the trace and writes its file, where one is running."""
        if not self._running:
            return
        self._running = False
        self._profile.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.path))
