"""How long a run will take, at the pace of its last steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fsdpq.launch.runs.lock_file import as_mapping
from fsdpq.launch.runs.log_files import last_lines
from fsdpq.launch.runs.status import RunStatus
from fsdpq.run_files.paths import RunFiles

_ROWS = 30
"""Rows that the pace is taken from: evaluations among them count as what they are, time."""


def seconds_left(status: RunStatus) -> float | None:
    """Returns how long the steps that are left take; None where that cannot be told.

    A run that waits or has ended has no pace, nor has one with a single step.
    """
    if status.state != "running" or status.phase != "train" or not status.total_steps:
        return None
    path = RunFiles(status.root).metrics
    steps = [row for line in last_lines(path, _ROWS)[0] if (row := _step(line)) is not None]
    # What was written before the run went back to a checkpoint says nothing.
    newest = [row for row in steps if steps[-1]["step"] >= row["step"]]
    done = newest[-1]["step"] - newest[0]["step"] if newest else 0
    if done <= 0:
        return None
    pace = (newest[-1]["time"] - newest[0]["time"]) / done
    return pace * (status.total_steps - newest[-1]["step"])


def _step(line: str) -> Mapping[str, Any] | None:
    try:
        content: Any = json.loads(line)
    except ValueError:
        return None  # cut off at its start, or not whole yet
    row = as_mapping(content)
    return row if row.get("event") == "step" else None
