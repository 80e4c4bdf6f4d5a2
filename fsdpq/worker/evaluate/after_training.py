"""The recipe's tasks at the end of a run, through what it has just trained."""

from __future__ import annotations

import time
from importlib import metadata

import torch

from fsdpq import dist
from fsdpq.protocols import MetricSink
from fsdpq.recipe.precision import precision_of
from fsdpq.run_files.evaluation_job import TRAINED, ModelResult, Record
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.evaluate.run import write_record
from fsdpq.worker.evaluate.subject import Subject
from fsdpq.worker.evaluate.tasks import run_tasks

NAME = "after-training"
"""Of the record."""

PACKAGES = ("fsdpq", "torch", "transformers", "lm_eval")


def measure_tasks(subject: Subject, files: RunFiles, events: MetricSink) -> None:
    """Runs the recipe's tasks, if any, and keeps their metrics in the run's folder ``evals``.

    Ranks: all (collective).

    Args:
        subject: the model as it was trained.
        files: of the run.
        events: told how many questions are answered.
    """
    if not subject.recipe.evaluation.tasks:
        return
    events.write({"event": "phase", "name": "tasks"})
    started = time.monotonic()
    result = ModelResult(tasks=run_tasks(subject, events))
    if dist.rank() != 0:
        return
    recipe, device = subject.recipe, subject.device
    about = {
        "name": NAME,
        "run": str(files.root),
        "model": recipe.model.name_or_path,
        "data": [],
        "rows": "none",
        "stride": None,
        "seq_len": recipe.data.seq_len,
        "trained": None,
        "step": None,
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "overrides": [],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    setup = {
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": precision_of(recipe).words,
        "data_digest": "",
        "seconds": time.monotonic() - started,
    }
    write_record(Record(about, setup, {TRAINED: result}), files.evals / f"{NAME}.json")
