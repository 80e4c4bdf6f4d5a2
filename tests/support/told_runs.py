"""Run directories as the ranks and the launcher leave them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdpq.launch.runs.launcher_record import LauncherRecord, write_launcher
from fsdpq.run_files.paths import RunFiles

Row = dict[str, Any]
START = 1_700_000_000.0


class ToldRun:
    """A run directory whose rows are written by the test."""

    def __init__(self, root: Path, *, name: str = "mine", total_steps: int = 10) -> None:
        self.files = RunFiles(root)
        self.total_steps = total_steps
        self.now = START
        self.files.logs.mkdir(parents=True)
        self.files.resolved.write_text(f"version: 1\nname: {name}\n")
        self.files.lock.write_text("{}\n")

    def launch(self, **fields: Any) -> ToldRun:
        """Writes the launcher's record, of a process that is gone unless said otherwise."""
        gone = {"pid": 2**22 + 1, "host": _host(), "time": self.now}
        write_launcher(self.files, LauncherRecord(**(gone | fields)))
        return self

    def event(self, event: str, **fields: Any) -> ToldRun:
        """Appends a row of events."""
        return self._write(self.files.events, {"event": event, **fields})

    def phase(self, *names: str) -> ToldRun:
        for name in names:
            self.event("phase", name=name)
        return self

    def step(self, *numbers: int, loss: float | None = None) -> ToldRun:
        """Appends rows of steps; a loss that is not given is 10 / step."""
        for number in numbers:
            row = {
                "event": "step", "step": number, "total_steps": self.total_steps,
                "loss": 10 / number if loss is None else loss, "lr": 1e-3, "grad_norm": 1.0,
                "tokens": 64, "trained_tokens": 32, "tokens_per_s": 640.0, "data_wait_s": 0.0,
                "memory_bytes": 2**30,
            }  # fmt: skip
            self._write(self.files.metrics, row)
        return self

    def eval(self, step: int, loss: float) -> ToldRun:
        """Appends the row of an evaluation."""
        row = {"event": "eval", "step": step, "loss": loss, "perplexity": 2.0, "trained_tokens": 9}
        return self._write(self.files.metrics, row)

    def checkpoint(self, step: int) -> ToldRun:
        """Makes an empty checkpoint."""
        (self.files.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        return self

    def done(self, steps: int) -> ToldRun:
        """Appends the last row of a run."""
        self.phase("export", "report")
        return self.event(
            "done", steps=steps, train_s=6.0, tokens=640, trained_tokens=320, eval_loss_before=3.0,
            eval_loss_after=2.0, peak_memory_bytes=[2**30, 2**29], peak_host_bytes=[2**30, 2**29],
            adapter=str(self.files.adapter),
        )  # fmt: skip

    def _write(self, path: Path, row: Row) -> ToldRun:
        self.now += 1.0
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"time": self.now}) + "\n")
        return self


def _host() -> str:
    import socket

    return socket.gethostname()
