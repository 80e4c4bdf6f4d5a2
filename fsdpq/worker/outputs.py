"""Where rank 0's metrics go, as the recipe asks."""

from __future__ import annotations

import secrets
from pathlib import Path

from fsdpq import dist
from fsdpq.metrics.sinks import JsonlSink, ManySinks, NoSink, TensorboardSink, WandbSink
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.run_files import RunFiles, write_whole


def open_rows(path: Path) -> JsonlSink | NoSink:
    """Returns what takes rows for ``path``: a file on rank 0, nothing elsewhere."""
    return JsonlSink(path) if dist.rank() == 0 else NoSink()


def open_metrics(recipe: Recipe, files: RunFiles, events: MetricSink) -> ManySinks:
    """Returns the sinks of ``metrics.sinks``; ``metrics.jsonl`` is always one of them."""
    sinks: list[JsonlSink | NoSink | TensorboardSink | WandbSink] = [open_rows(files.metrics)]
    if dist.rank() != 0:
        return ManySinks(sinks)
    if "tensorboard" in recipe.metrics.sinks:
        sinks.append(TensorboardSink(files.tensorboard))
    if "wandb" in recipe.metrics.sinks:
        sinks.append(
            WandbSink(
                recipe.metrics.wandb,
                files.root,
                name=files.root.name,
                run_id=_run_id(files.wandb_id),
                settings=recipe.model_dump(mode="json"),
                notify=lambda text: events.write({"event": "notice", "message": text}),
            )
        )
    return ManySinks(sinks)


def _run_id(path: Path) -> str:
    """Returns the id in ``path``, a new one where there is none."""
    if not path.exists():
        write_whole(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8")
