"""Measures a model, as one rank sees it: the base first, then what was trained on top of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.data.preparing.prepared import PreparedRows
from fsdpq.data.text.tokenize import digest_rows
from fsdpq.errors import TrainingError
from fsdpq.protocols import MetricSink
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.reports.report import write_report
from fsdpq.run_files.evaluation_job import BASE, CHECKPOINT, EvaluationJob, ModelResult, Record
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.tensor_files.checkpoint_manifest import check_checkpoint
from fsdpq.worker.assemble import (
    Assembled,
    Inputs,
    assemble_model,
    read_inputs,
    without_gpu_kernels,
)
from fsdpq.worker.evaluate.losses import Groups, group_by_source, measure_losses
from fsdpq.worker.evaluate.subject import Subject
from fsdpq.worker.evaluate.windows import cut_windows, read_whole_text
from fsdpq.worker.export.formats import FORMATS
from fsdpq.worker.keeping.saved_weights import load_saved_weights
from fsdpq.worker.outputs import open_rows
from fsdpq.worker.setup import load_data
from fsdpq.worker.tokenizer import check_context, load_tokenizer


def evaluate(files: RunFiles, *, trust_remote_code: bool = False) -> None:
    """Does the job that the launcher left in ``files``, and writes its record.

    Ranks: all (collective).
    """
    started = time.monotonic()
    recipe, job = load_resolved(files.resolved), EvaluationJob.read(files)
    if recipe.launch.device == "cpu":
        recipe = without_gpu_kernels(recipe)
    inputs = read_inputs(files, trust_remote_code=trust_remote_code)
    device = dist.start_process_group(recipe.launch.device)
    dist.seed_everything(recipe.training.seed)
    events = open_rows(files.events)
    events.write({"event": "phase", "name": "data"})
    tokenizer = load_tokenizer(inputs.model_dir, trust_remote_code=trust_remote_code)
    groups, digest = read_groups(job, recipe, inputs, tokenizer, events)
    assembled = load_base(recipe, inputs, events, device)
    subject = Subject(recipe, assembled, tokenizer, inputs.model_dir, device, job.include_path)
    models: dict[str, ModelResult] = {}
    for name in job.models:
        if name != BASE:
            load_trained(assembled, job)
        events.write({"event": "phase", "name": "eval"})
        models[name] = measure(subject, groups, events)
    setup = {
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": precision_of(recipe).words,
        "data_digest": digest,
        "seconds": time.monotonic() - started,
    }
    if dist.rank() == 0:
        write_record(Record(job.about, setup, models), job.output)
        if job.run_dir is not None:
            write_report(RunFiles(job.run_dir))
    dist.wait_for_all()


def load_base(
    recipe: Recipe, inputs: Inputs, events: MetricSink, device: torch.device
) -> Assembled:
    """Returns the base with what is to be trained at its initial values, which change nothing.

    Ranks: all (collective).
    """
    events.write({"event": "phase", "name": "load"})
    assembled = assemble_model(
        recipe,
        inputs.model_dir,
        device=device,
        report_load=lambda done, total: events.write(
            {"event": "load", "done_bytes": done, "total_bytes": total}
        ),
        base=inputs.base,
        trust_remote_code=inputs.trust_remote_code,
    )
    for notice in assembled.notices:
        events.write({"event": "notice", "message": notice})
    return assembled


def measure(subject: Subject, groups: Groups, events: MetricSink) -> ModelResult:
    """Returns what the model as it is now gets.

    Ranks: all (collective).
    """
    recipe, model = subject.recipe, subject.assembled.model
    result = ModelResult()
    if groups:
        result = measure_losses(recipe, model, groups, subject.device)
    if recipe.evaluation.tasks:
        from fsdpq.worker.evaluate.tasks import run_tasks

        result = replace(result, tasks=run_tasks(subject, events))
    return result


def load_trained(assembled: Assembled, job: EvaluationJob) -> None:
    """Fills the model with what was trained.

    Ranks: all (collective).
    """
    if job.trained is None:
        raise RuntimeError("this job names nothing that was trained")
    if job.trained_format != CHECKPOINT:
        FORMATS[job.trained_format].load(assembled, job.trained)
        return
    check_checkpoint(job.trained, share=(dist.rank(), dist.world_size()))
    load_saved_weights(assembled, job.trained)


def read_groups(
    job: EvaluationJob,
    recipe: Recipe,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    events: MetricSink,
) -> tuple[Groups, str]:
    """Returns the rows to measure by their source, and their digest; none where none are asked for.

    Ranks: all (collective).
    """
    readers: dict[str, Callable[[], tuple[Groups, str]]] = {
        "none": lambda: ({}, ""),
        "text": lambda: _read_windows(job, recipe, inputs, tokenizer),
    }
    if job.rows in readers:
        return readers[job.rows]()
    data = load_data(recipe, inputs, tokenizer, events)
    rows = data.held_out if job.rows == "held_out" else data.train
    if not rows:
        hint = "name other rows with `--data`"
        raise TrainingError("there are no rows to evaluate", hint=hint)
    if not isinstance(rows, PreparedRows) or inputs.data is None:
        return {"made up": rows}, data.digest
    names = [source.name for source in inputs.data.every]
    return group_by_source(rows, names), data.digest


def _read_windows(
    job: EvaluationJob, recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> tuple[Groups, str]:
    if inputs.data is None:
        raise RuntimeError("this job names no text")
    seq_len = recipe.data.seq_len
    check_context(seq_len, inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    source = inputs.data.train[0]
    rows = cut_windows(read_whole_text(source), tokenizer, seq_len=seq_len, stride=job.stride)
    digest = digest_rows(rows)
    dist.check_same_on_all_ranks("the windows of the text", digest)
    return {source.name: rows}, digest


def write_record(record: Record, path: Path) -> None:
    """Writes a record as JSON."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(record.as_json(), indent=2, ensure_ascii=False, default=str)
    write_whole(path, (text + "\n").encode())
