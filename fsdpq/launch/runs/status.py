"""How a run stands, from the files in its directory: what ``runs ls`` and ``status`` show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["queued", "starting", "running", "finished", "failed", "saved", "stopped", "lost"]
"""``saved`` was stopped and can go on; ``stopped`` has no checkpoint; ``lost`` says it runs and
has no process; ``queued`` waits in Slurm's queue."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        root: its directory.
        name: of the recipe.
        state: see `State`.
        step: the last one that was logged, 0 before the first.
        total_steps: None where that is not known yet.
        train_loss: the last one that was logged.
        eval_loss: the last held-out loss.
        best_eval_loss: the lowest one.
        num_bytes: of all files of the directory.
        started: seconds since the epoch.
        updated: when it last wrote a row.
        where: host and process, or Slurm job, that has it; empty where nobody has.
        error: one line for what ended it, else empty.
    """

    root: Path
    name: str
    state: State
    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    num_bytes: int = 0
    started: float | None = None
    updated: float | None = None
    where: str = ""
    error: str = ""
