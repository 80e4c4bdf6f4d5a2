"""The flow of ``fsdpq eval``: a run or a recipe is measured by ranks, which leave a record.

The ranks get a run directory of their own, which is thrown away when they are done and kept where
they fail. The record of a run goes into its folder ``evals``, and its report is made anew.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import (
    CheckpointError,
    EnvironmentProblemError,
    LaunchError,
    RunStoppedError,
    UsageError,
)
from fsdpq.launch.inputs.base_cache import find_base, held_inputs
from fsdpq.launch.inputs.evaluated import (
    HELD_OUT,
    NONE,
    Subject,
    find_sources,
    open_subject,
)
from fsdpq.launch.inputs.fetched import fetch_base_model
from fsdpq.launch.inputs.harness_data import fetch_task_data
from fsdpq.launch.inputs.prepare import prepare_inputs
from fsdpq.launch.machine.devices import check_bf16, list_gpus
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.quantize import QuantizeJob
from fsdpq.launch.question import Question
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.torchrun import check_endpoint, run_torchrun
from fsdpq.launch.runs.lock_file import describe_run
from fsdpq.launch.runs.run_dir import create_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.root import Recipe
from fsdpq.registry import check_packages
from fsdpq.rows.files.kinds import kind_of
from fsdpq.rows.source import DataSources
from fsdpq.run_files.evaluation_job import BASE, CHECKPOINT, TRAINED, EvaluationJob
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import (
    list_checkpoints,
    read_checkpoint,
    step_of,
)

EVALUATOR = ("-m", "fsdpq.worker", "evaluate")


@dataclass(frozen=True)
class Trained:
    """What was trained, as it lies on disk.

    Attributes:
        directory: of the export or the checkpoint.
        format: ``export.format``, or `CHECKPOINT`.
        step: of the checkpoint, None for an export.
    """

    directory: Path
    format: str
    step: int | None = None


@dataclass(frozen=True)
class _Plan:
    """An evaluation, decided.

    Attributes:
        target: as the user named it.
        subject: what it is.
        question: what to measure.
        recipe: resolved for this machine.
        gpus: of this machine.
        trained: what was trained, None for the base alone.
        sources: the rows to measure, None for none.
        stride: of the windows of a text, 0 for rows.
    """

    target: Path
    subject: Subject
    question: Question
    recipe: Recipe
    gpus: Sequence[str]
    trained: Trained | None
    sources: DataSources | None
    stride: int

    @property
    def rows(self) -> str:
        """Which rows the ranks measure: `EvaluationJob.rows`."""
        if self.stride:
            return "text"
        return self.subject.rows if self.subject.rows in (HELD_OUT, NONE) else "train"


def evaluate(
    target: Path,
    overrides: Sequence[str],
    question: Question,
    *,
    screen: Screen,
    trust_remote_code: bool = False,
    worker: Sequence[str] = EVALUATOR,
) -> dict[str, Any]:
    """Measures a run, or the base model of a recipe; returns the record as plain data.

    Args:
        target: a run directory or a recipe.
        overrides: of the keys that an evaluation reads.
        question: what to measure.
        screen: shows what happens.
        trust_remote_code: let the ranks run Python code that the model brings.
        worker: arguments of torchrun that name the worker.

    Raises:
        UsageError: there is nothing that can be measured.
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    gpus = list_gpus()
    subject = open_subject(target, overrides, question, num_gpus=len(gpus))
    trained = find_trained(subject, question)
    recipe = resolve_launch(subject.loaded.recipe, num_gpus=len(gpus))
    check_packages(recipe)
    if recipe.launch.device == "cuda":
        check_bf16(told_dtype(recipe), gpus)
    check_endpoint(recipe.launch)
    sources = find_sources(subject, screen=screen)
    stride = find_stride(recipe, question, sources)
    if recipe.evaluation.tasks:
        fetch_task_data(recipe.evaluation.tasks, question.include_path, screen=screen)
    plan = _Plan(target, subject, question, recipe, gpus, trained, sources, stride)
    inputs = _find_inputs(plan, screen=screen, trust_remote_code=trust_remote_code)
    worker = (*worker, TRUST_FLAG) if trust_remote_code else worker
    with held_inputs(inputs):
        return _run_ranks(plan, inputs, screen=screen, worker=worker)


def find_trained(subject: Subject, question: Question) -> Trained | None:
    """Returns what a run trained, None for a recipe.

    Raises:
        UsageError: the run exported nothing, or has no such checkpoint.
    """
    run, wanted = subject.run, question.checkpoint
    if run is None:
        return None
    export_format = subject.loaded.recipe.export.format
    directory = run.exported(export_format)
    if not wanted and directory.is_dir():
        return Trained(directory, export_format)
    saved = _read_checkpoints(run)
    if not saved and not wanted:
        message = f"the run `{run.root}` has exported nothing and has no checkpoint"
        raise UsageError(message, hint="name its recipe to measure the base alone")
    chosen = _choose(saved, wanted or "newest")
    if chosen is None:
        known = ", ".join(str(step_of(path)) for path in sorted(saved))
        message = f"`--checkpoint {wanted}`: the run `{run.root}` has no such checkpoint"
        raise UsageError(
            message, hint=f"it has those of the steps {known}" if known else "it has none"
        )
    return Trained(chosen, CHECKPOINT, step_of(chosen))


def _read_checkpoints(run: RunFiles) -> dict[Path, float | None]:
    """Returns the run's checkpoints, newest first, with their held-out losses."""
    found: dict[Path, float | None] = {}
    for path in list_checkpoints(run.checkpoints):
        try:
            found[path] = read_checkpoint(path).eval_loss
        except CheckpointError:
            found[path] = None  # damaged: refused only where it is what was asked for
    return found


def _choose(saved: Mapping[Path, float | None], wanted: str) -> Path | None:
    if wanted == "newest":
        return next(iter(saved), None)
    if wanted == "best":
        losses = {path: loss for path, loss in saved.items() if loss is not None}
        return min(losses, key=losses.__getitem__, default=None)
    return next((path for path in saved if str(step_of(path)) == wanted), None)


def find_stride(recipe: Recipe, question: Question, sources: DataSources | None) -> int:
    """Returns the stride of the windows of a text; 0 where rows are measured one by one.

    Raises:
        UsageError: ``--stride`` without rows of text, or longer than a window.
    """
    stride, seq_len = question.stride, recipe.data.seq_len
    if sources is None or not question.data:
        if stride is not None:
            raise UsageError("`--stride` cuts the text of `--data`", hint="name it with `--data`")
        return 0
    source = sources.train[0]
    is_file = bool(source.files) and all(kind_of(f.path) == ".txt" for f in source.files)
    if stride is None:
        return seq_len if is_file and source.format == "text" else 0
    if source.format != "text":
        message = f"`--stride` cuts a text, and these rows are `{source.format}`"
        raise UsageError(message, hint="leave `--stride` out: rows are measured one by one")
    if stride > seq_len:
        message = f"`--stride {stride}` is longer than a window of `data.seq_len: {seq_len}`"
        raise UsageError(message, hint=f"use `--stride {seq_len}` at most, or a longer window")
    return stride


def _find_inputs(plan: _Plan, *, screen: Screen, trust_remote_code: bool) -> dict[str, Any]:
    """Returns the inputs of the ranks' lock."""
    loaded, lock = plan.subject.loaded, plan.subject.lock
    model = (
        lock["inputs"]["model"]
        if lock
        else fetch_base_model(loaded, screen=screen, trust_remote_code=trust_remote_code)
    )
    inputs: dict[str, Any] = {"model": model}
    job = QuantizeJob(loaded, plan.recipe, plan.gpus, model, trust_remote_code)
    base = find_base(job, screen=screen)
    inputs |= {"base": base} if base is not None else {}
    if plan.sources is None:
        return inputs
    inputs["data"] = plan.sources.as_json()
    if plan.rows == "text":
        return inputs
    trust = trust_remote_code
    return inputs | prepare_inputs(plan.recipe, inputs, screen=screen, trust_remote_code=trust)


def _run_ranks(
    plan: _Plan, inputs: dict[str, Any], *, screen: Screen, worker: Sequence[str]
) -> dict[str, Any]:
    """Lets the ranks measure; returns their record."""
    loaded, recipe = plan.subject.loaded, plan.recipe
    trust = TRUST_FLAG in worker
    lock = describe_run(loaded, recipe, gpus=plan.gpus, inputs=inputs, trust_remote_code=trust)
    root = Path(tempfile.mkdtemp(prefix="fsdpq-eval-"))
    files = create_run_dir(recipe, raw=loaded.raw, lock=lock, run_dir=root)
    name = _name(plan)
    output = root / f"{name}.json"
    if plan.subject.run is not None:
        output = _reserve(plan.subject.run.evals.absolute(), name)
    job = _build_job(plan, output, versions={"fsdpq": lock["fsdpq"], **lock["packages"]})
    job.write(files)
    oom_kills = count_oom_kills()
    try:
        code, stopped_by = run_torchrun(files, recipe.launch, on_row=screen.show_row, worker=worker)
    finally:
        screen.close()
    if stopped_by or code != 0 or not output.exists():
        if stopped_by:
            shutil.rmtree(root, ignore_errors=True)
            raise RunStoppedError(f"stopped by {stopped_by} while evaluating")
        if code != 0:
            raise explain_failure(files, exit_code=code, oom_kills_before=oom_kills)
        message = "the ranks ended without a result"
        raise LaunchError(message, hint=f"the logs are in `{files.logs}`")
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    shutil.rmtree(root, ignore_errors=True)
    return record | ({"file": str(output)} if plan.subject.run is not None else {})


def _build_job(plan: _Plan, output: Path, *, versions: dict[str, Any]) -> EvaluationJob:
    trained, question, run = plan.trained, plan.question, plan.subject.run
    models = [BASE] * (question.base or trained is None) + [TRAINED] * (trained is not None)
    about = {
        "name": output.stem,
        "run" if run is not None else "recipe": str(plan.target),
        "model": plan.recipe.model.name_or_path,
        "data": _describe_data(plan),
        "rows": plan.rows,
        "stride": plan.stride or None,
        "seq_len": plan.recipe.data.seq_len,
        "trained": None if trained is None else str(trained.directory),
        "step": None if trained is None else trained.step,
        "evaluation": plan.recipe.evaluation.model_dump(mode="json"),
        "overrides": list(plan.subject.loaded.overrides),
        "versions": versions,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return EvaluationJob(
        output=output,
        about=about,
        rows=plan.rows,
        stride=plan.stride,
        models=models,
        trained=None if trained is None else trained.directory.absolute(),
        trained_format="" if trained is None else trained.format,
        include_path=None if question.include_path is None else question.include_path.absolute(),
        run_dir=None if run is None else run.root.absolute(),
    )


def _describe_data(plan: _Plan) -> list[dict[str, Any]]:
    sources = plan.sources
    if sources is None:
        return []
    return [
        {
            "name": source.name,
            "format": source.format,
            "revision": source.revision,
            "files": [{"path": str(file.path), "sha256": file.sha256} for file in source.files],
        }
        for source in ([sources.eval] if sources.eval is not None else sources.train)
    ]


def _name(plan: _Plan) -> str:
    """Returns the name of the record's file: what was measured."""
    named = plan.question.data
    text = Path(named).name.partition(".")[0] or "rows" if named else "held-out"
    text = "-".join(plan.question.tasks) if plan.rows == NONE else text
    step = "" if plan.trained is None or plan.trained.step is None else f"-step-{plan.trained.step}"
    return (re.sub(r"[^\w.-]+", "-", text).strip(".-").lower()[:60] or "rows") + step


def _reserve(directory: Path, name: str) -> Path:
    """Returns a path in ``directory`` where no file is yet."""
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        message = f"`{directory}` cannot be written: {error.strerror}"
        raise EnvironmentProblemError(message, hint="make the run directory writable") from None
    path, number = directory / f"{name}.json", 1
    while path.exists():
        number += 1
        path = directory / f"{name}-{number}.json"
    return path
