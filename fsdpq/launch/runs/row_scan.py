"""What the rows of a run say about how it stands, without reading them all.

``metrics.jsonl`` holds a row a step and may be large; evaluations in it are few. So the file is
searched for the mark of a kind of row, and only rows of that kind are parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fsdpq.reports.run_record import Row, is_void
from fsdpq.run_files.paths import RunFiles

_EVENTS = ("phase", "setup", "resume", "stopped", "done")


@dataclass
class Progress:
    """How far a run came, by its rows.

    Attributes:
        step: the last one that was logged and still counts, 0 before the first.
        total_steps: None where that is not known.
        train_loss: of that step; None where it is not finite.
        eval_loss: of the last evaluation that counts.
        best_eval_loss: the lowest of those.
        first_time: of the first row of events, in seconds since the epoch.
        last_time: of the newest row.
        phase: the last one that began.
        phases: those that began since ``since`` of `scan_rows`.
        end: the row ``done`` or ``stopped`` that nothing came after, else empty.
    """

    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    first_time: float | None = None
    last_time: float | None = None
    phase: str = ""
    phases: set[str] = field(default_factory=set[str])
    end: Row = field(default_factory=dict[str, Any])


def scan_rows(files: RunFiles, *, since: float = 0.0) -> Progress:
    """Returns how far a run came.

    Args:
        files: of the run.
        since: when its ranks last started, in seconds since the epoch.
    """
    found, resumes = Progress(), list[Row]()
    for row in _rows(files.events, _EVENTS):
        _take_event(found, row, since)
        if row["event"] == "resume":
            resumes.append({"step": int(row["step"]), "time": float(row["time"])})
    content = _content(files.metrics)
    _take_losses(found, content, resumes)
    _take_last_step(found, content, resumes)
    return found


def _take_event(found: Progress, row: Row, since: float) -> None:
    event, time = row["event"], row.get("time")
    if isinstance(time, float):
        found.first_time = found.first_time or time
        found.last_time = time
    if event == "phase":
        found.phase = str(row["name"])
        if (time or 0.0) >= since:
            found.phases.add(found.phase)
        if found.phase != "report":
            found.end = {}  # a later start
    elif event == "setup":
        found.total_steps = row.get("total_steps")
    elif event in ("stopped", "done"):
        found.end = row


def _take_losses(found: Progress, content: bytes, resumes: list[Row]) -> None:
    losses: dict[int, float] = {}
    for row in _marked(content, "eval"):
        if not is_void(row, resumes):
            losses[int(row["step"])] = float(row["loss"])
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if finite:
        found.best_eval_loss = min(finite)
    if losses and math.isfinite(last := losses[max(losses)]):
        found.eval_loss = last


def _take_last_step(found: Progress, content: bytes, resumes: list[Row]) -> None:
    for row in _marked_backwards(content, "step"):
        if found.last_time is None or row["time"] > found.last_time:
            found.last_time = row["time"]
        if not is_void(row, resumes):
            found.step, found.total_steps = row["step"], row.get("total_steps")
            loss = row.get("loss")
            found.train_loss = loss if loss is not None and math.isfinite(loss) else None
            return


def _rows(path: Path, events: tuple[str, ...]) -> Iterator[Row]:
    marks = [_mark(event) for event in events]
    for line in _content(path).splitlines(keepends=True):
        if any(mark in line for mark in marks) and (row := _parse(line)) is not None:
            yield row


def _marked(content: bytes, event: str) -> Iterator[Row]:
    mark, position = _mark(event), 0
    while (position := content.find(mark, position)) >= 0:
        if (row := _row_at(content, position)) is not None:
            yield row
        position += len(mark)


def _marked_backwards(content: bytes, event: str) -> Iterator[Row]:
    mark, end = _mark(event), len(content)
    while (position := content.rfind(mark, 0, end)) >= 0:
        if (row := _row_at(content, position)) is not None:
            yield row
        end = position


def _row_at(content: bytes, position: int) -> Row | None:
    start, end = content.rfind(b"\n", 0, position) + 1, content.find(b"\n", position)
    return _parse(content[start : end + 1]) if end >= 0 else None


def _parse(line: bytes) -> Row | None:
    """Returns a row; None where it is not whole, which a later line may still be."""
    try:
        row: Any = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return cast("Row", row) if isinstance(row, dict) and "event" in row else None


def _mark(event: str) -> bytes:
    """What rows of a kind hold and no text in them can: quotes in a text are escaped."""
    return f'"event": "{event}"'.encode()


def _content(path: Path) -> bytes:
    """Returns a file as it is now; it grows. Nothing where it is not there."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
