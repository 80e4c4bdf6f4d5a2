"""Where rank 0's metrics go, as the recipe asks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdpq import dist
from fsdpq.metrics.sinks import JsonlSink, ManySinks, NoSink, TensorboardSink, WandbSink
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.worker.keeping.heartbeat import Heartbeat

WANDB_ID = "wandb-id"
"""File of the run directory with its id at Weights & Biases: a resumed run goes on there."""


def open_rows(path: Path) -> JsonlSink | NoSink:
    """Returns what takes rows for ``path``: a file on rank 0, nothing elsewhere."""
    return JsonlSink(path) if dist.rank() == 0 else NoSink()


def open_metrics(recipe: Recipe, files: RunFiles, events: MetricSink) -> ManySinks:
    """Returns the sinks of ``metrics.sinks``; ``metrics.jsonl`` is always one of them."""
    sinks: list[JsonlSink | NoSink | TensorboardSink | WandbSink] = [open_rows(files.metrics)]
    if dist.rank() != 0:
        return ManySinks(sinks)

    def notify(text: str) -> None:
        events.write({"event": "notice", "message": text})

    if "tensorboard" in recipe.metrics.sinks:
        sinks.append(TensorboardSink(files.tensorboard, notify=notify))
    if "wandb" in recipe.metrics.sinks:
        sinks.append(
            WandbSink(
                recipe.metrics.wandb,
                files.root,
                name=files.root.name,
                run_id=_run_id(files.root / WANDB_ID),
                settings=recipe.model_dump(mode="json"),
                notify=notify,
            )
        )
    return ManySinks(sinks)


def _run_id(path: Path) -> str:
    """Returns the id in ``path``, a new one where there is none."""
    if not path.exists():
        write_whole(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8")


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
