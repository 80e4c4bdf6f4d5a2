"""Where rank 0's metrics go, as the recipe asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdpq import dist
from fsdpq.metrics.sinks import JsonlSink, ManySinks, NoSink, TensorboardSink
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.keeping.heartbeat import Heartbeat


def open_rows(path: Path) -> JsonlSink | NoSink:
    """Returns what takes rows for ``path``: a file on rank 0, nothing elsewhere."""
    return JsonlSink(path) if dist.rank() == 0 else NoSink()


def open_metrics(recipe: Recipe, files: RunFiles, events: MetricSink) -> ManySinks:
    """Returns the sinks of ``metrics.sinks``; ``metrics.jsonl`` is always one of them.

    ``wandb`` is the launcher's.
    """
    sinks: list[JsonlSink | NoSink | TensorboardSink] = [open_rows(files.metrics)]
    if dist.rank() != 0:
        return ManySinks(sinks)

    def notify(text: str) -> None:
        events.write({"event": "notice", "message": text})

    if "tensorboard" in recipe.metrics.sinks:
        sinks.append(TensorboardSink(files.tensorboard, notify=notify))
    return ManySinks(sinks)


class WatchedEvents:
    """Passes events on, as signs of life; a ``phase`` begins one, also on ranks that write nothing.

    Args:
        events: where they go.
        heartbeat: of this rank.
    """

    def __init__(self, events: MetricSink, heartbeat: Heartbeat) -> None:
        self._events = events
        self._heartbeat = heartbeat

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row."""
        if row["event"] == "phase":
            self._heartbeat.enter(row["name"])
        else:
            self._heartbeat.beat_again()
        self._events.write(row)
