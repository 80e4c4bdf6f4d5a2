"""Training, as one rank sees it: ~15 readable calls in order."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fsdpq import dist
from fsdpq.data.dealing.loader import Loader
from fsdpq.metrics.memory import MemoryLog
from fsdpq.metrics.sinks import ManySinks
from fsdpq.protocols import MetricSink
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import MetricsOptions
from fsdpq.reports.report import find_drift, write_report
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RunSummary, SetupSummary
from fsdpq.tensor_files.checkpoint_manifest import base_identity
from fsdpq.training.loop import LoopState, Progress, Trainer
from fsdpq.worker.answering.answerer import Answerer, build_asker
from fsdpq.worker.assemble import (
    Assembled,
    Inputs,
    assemble_model,
    read_inputs,
    stop_ids,
)
from fsdpq.worker.evaluate.after_training import measure_tasks
from fsdpq.worker.evaluate.subject import Subject
from fsdpq.worker.export.finish import Trained, check_exportable, export_run
from fsdpq.worker.from_disk import reading_notices
from fsdpq.worker.keeping.checkpoints import Checkpoints
from fsdpq.worker.keeping.ending import Keeping
from fsdpq.worker.keeping.essentials import Essentials
from fsdpq.worker.keeping.room import check_room, exported_bytes, wait_for_room
from fsdpq.worker.keeping.run_state import RunState
from fsdpq.worker.keeping.watch import RankWatch, group_timeout
from fsdpq.worker.outputs import WatchedEvents, open_metrics, open_rows
from fsdpq.worker.setup import Data, build_trainer, load_data
from fsdpq.worker.steps import open_loader
from fsdpq.worker.stream import report_stream
from fsdpq.worker.tokenizer import load_tokenizer

LOAD_REPORT_S = 0.2


def run_rank(
    files: RunFiles,
    *,
    trust_remote_code: bool = False,
    resume: bool = False,
    inputs: Path | None = None,
) -> None:
    """Trains as one rank of a run that is watched.

    Ranks: all (collective).

    Args:
        files: the run directory.
        trust_remote_code: run Python code that the model brings.
        resume: go on from the newest whole checkpoint, where there is one.
        inputs: where this machine has model and data; None is as the lock says.

    Raises:
        PlanError: this rank ran out of memory; says what it held.
    """
    watch = RankWatch.open(files)
    with watch.post_mortem.explained():
        found = read_inputs(files, trust_remote_code=trust_remote_code, own=inputs)
        train(files, watch, found, resume=resume)


def train(files: RunFiles, watch: RankWatch, inputs: Inputs, *, resume: bool) -> None:
    """Runs the recipe of a run directory; code that the model brings only where it is trusted.

    Ranks: all (collective).

    Args:
        files: the run directory.
        watch: of this rank.
        inputs: where model and data lie, and whether the model's code is trusted.
        resume: go on from the newest whole checkpoint, where there is one.
    """
    recipe, trust_remote_code = load_resolved(files.resolved), inputs.trust_remote_code
    device = dist.start_process_group(recipe.launch.device, timeout=group_timeout(recipe))
    dist.seed_everything(recipe.training.seed)
    events = WatchedEvents(open_rows(files.events), watch.heartbeat)
    enter(events, "data")
    tokenizer = load_tokenizer(inputs.model_dir, trust_remote_code=trust_remote_code)
    data = load_data(recipe, inputs, tokenizer, events)
    loader = open_loader(recipe, data.order(recipe), data.num_train_rows, device)
    enter(events, "load")
    metrics = open_metrics(recipe, files, events)
    memory = MemoryLog(metrics, device, every_step=recipe.metrics.log_memory)
    assembled = assemble_model(
        recipe,
        inputs.model_dir,
        device=device,
        report_load=load_reporter(events),
        base=inputs.base,
        trust_remote_code=trust_remote_code,
        on_phase=memory,
    )
    notify(events, *assembled.notices, *reading_notices(recipe, assembled.mapped_base))
    trainer = build_trainer(
        recipe, assembled, data, metrics, events, files=files, device=device,
        breaks_off=watch.breaks_off,
    )  # fmt: skip
    trainer = dataclasses.replace(trainer, memory=memory)
    check_exportable(recipe, inputs, assembled)
    announce(events, summarize_setup(recipe, assembled, data, trainer, device))
    watch.post_mortem.learn(recipe, assembled, trainer, inputs.model_dir)
    answerer = Answerer(
        assembled,
        tokenizer,
        asks=build_asker(recipe, inputs.data, tokenizer),
        stop_ids=stop_ids(inputs.model_dir, tokenizer),
        device=device,
    )
    look = Look(trainer, answerer, recipe.metrics, events)
    checkpoints = open_checkpoints(recipe, files, assembled, trainer, loader, events)
    state = first_state(checkpoints, metrics, look, resume=resume or goes_on(recipe))
    keeping = Keeping(watch, checkpoints, events)
    progress, train_s = run_steps(keeping.attach(trainer), loader, events, checkpoints, state)
    report_stream(data.stream, recipe.data, events)
    loss_after = None if keeping.has_ended else look("after", progress.steps)
    if not keeping.end(state):
        wait_for_room(files.root, exported_bytes(recipe, assembled), watch, events)
    metrics.finish()  # rows that the disk did not take go there now
    if keeping.has_ended:
        dist.wait_for_all()
        return
    losses = (state.eval_losses.get(0), loss_after)
    done = summarize_run(progress, train_s, losses, memory, files.exported(recipe.export.format))
    trained = Trained(recipe, inputs, assembled, tokenizer, answerer.asks, done)
    leave(trained, files, events, device)


def leave(trained: Trained, files: RunFiles, events: MetricSink, device: torch.device) -> None:
    """Exports what was trained, asks it the recipe's tasks, and reports.

    Ranks: all (collective).
    """
    recipe, model_dir = trained.recipe, trained.inputs.model_dir
    export_run(trained, files, events, device=device)
    subject = Subject(recipe, trained.assembled, trained.tokenizer, model_dir, device)
    measure_tasks(subject, files, events)
    events.write({"event": "done", **dataclasses.asdict(trained.summary)})
    report(files, events)


@dataclasses.dataclass(frozen=True)
class Look:
    """Evaluates, and answers the recipe's prompts.

    Attributes:
        trainer: evaluates.
        answerer: answers.
        options: the recipe's ``metrics`` section.
        events: takes the answers.
    """

    trainer: Trainer
    answerer: Answerer
    options: MetricsOptions
    events: MetricSink

    def __call__(self, when: str, step: int) -> float | None:
        """Looks ``before`` or ``after`` training; returns the held-out loss, if any.

        Ranks: all (collective).
        """
        if self.trainer.evaluate is not None or self.options.sample_prompts:
            enter(self.events, "eval")
        loss = self.trainer.log_evaluation(step)
        self.answerer.write_samples(self.options, when, self.events)
        return loss


def report(files: RunFiles, events: MetricSink) -> None:
    """Writes the report.

    Ranks: all (collective); rank 0 writes.
    """
    enter(events, "report")
    if dist.rank() == 0:
        try:
            if (drift := find_drift(files)) is not None:
                notify(events, drift)
            write_report(files)
        except OSError as error:  # the run is done, whatever becomes of its report
            notify(events, f"the report cannot be written: {error}")
    dist.wait_for_all()


def goes_on(recipe: Recipe) -> bool:
    """Whether a run looks for checkpoints unasked: the recipe says so, or torchrun restarted it."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts > 0 or recipe.checkpoint.resume == "auto"


def first_state(
    checkpoints: Checkpoints,
    metrics: ManySinks,
    look: Callable[[str, int], float | None],
    *,
    resume: bool,
) -> LoopState:
    """Returns where training begins: at the newest whole checkpoint, or before the first step.

    Ranks: all (collective).
    """
    state = checkpoints.restore() if resume else None
    if state is not None:
        metrics.go_on_after(state.progress.steps)
        return state
    loss_before = look("before", 0)
    return LoopState(eval_losses={} if loss_before is None else {0: loss_before})


def open_checkpoints(
    recipe: Recipe,
    files: RunFiles,
    assembled: Assembled,
    trainer: Trainer,
    loader: Loader,
    events: MetricSink,
) -> Checkpoints:
    """Returns what saves this run and puts it back; says where the disk is too small for that.

    Ranks: all (collective).
    """
    check_room(recipe, trainer, files.root, events)
    lock = json.loads(files.lock.read_text(encoding="utf-8"))
    run = RunState(assembled, trainer, loader, recipe.training.seed)
    forced = bool((lock.get("resumes") or [{}])[-1].get("forced"))
    base = base_identity(lock)
    return Checkpoints(
        recipe, files.checkpoints, run, base=base, events=events, forced=forced,
        essentials=Essentials(files),
    )  # fmt: skip


def run_steps(
    trainer: Trainer,
    loader: Loader,
    events: MetricSink,
    checkpoints: Checkpoints,
    state: LoopState,
) -> tuple[Progress, float]:
    """Trains, and ends the loader; returns the totals and the seconds that it took.

    Ranks: all (collective).
    """
    enter(events, "train")
    checkpoints.begin()
    with loader:
        progress = trainer.run(loader, state)
    train_s = checkpoints.train_s
    checkpoints.finish()
    return progress, train_s


def enter(events: MetricSink, phase: str) -> None:
    """Tells the screen that a phase begins."""
    events.write({"event": "phase", "name": phase})


def announce(events: MetricSink, setup: SetupSummary) -> None:
    """Tells the screen what is about to be trained."""
    events.write({"event": "setup", **dataclasses.asdict(setup)})


def notify(events: MetricSink, *notices: str) -> None:
    """Tells the user what is worth knowing."""
    for notice in notices:
        events.write({"event": "notice", "message": notice})


def load_reporter(events: MetricSink) -> Callable[[int, int], None]:
    """Returns a callback that tells the screen how much is loaded, not too often."""
    last = 0.0

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOAD_REPORT_S or done_bytes == total_bytes:
            last = now
            row = {"event": "load", "done_bytes": done_bytes, "total_bytes": total_bytes}
            events.write(row)

    return report


def summarize_setup(
    recipe: Recipe, assembled: Assembled, data: Data, trainer: Trainer, device: torch.device
) -> SetupSummary:
    """Returns what is about to be trained.

    Ranks: all (collective).
    """
    base_bytes = dist.gather_numbers(assembled.own_bytes(trainable=False))
    adapter_bytes = dist.gather_numbers(assembled.own_bytes(trainable=True))
    on_gpu = device.type == "cuda"
    return SetupSummary(
        model=recipe.model.name_or_path,
        adapter_kind=recipe.adapter.kind,
        num_parameters=assembled.num_parameters,
        num_trainable=sum(parameter.numel() for parameter in trainer.parameters),
        num_quantized=assembled.num_quantized,
        num_groups=assembled.num_groups,
        world_size=dist.world_size(),
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        dtype=precision_of(recipe).words,
        base_bytes_per_rank=[int(value) for value in base_bytes],
        adapter_bytes_per_rank=[int(value) for value in adapter_bytes],
        num_train_rows=data.num_train_rows,
        num_eval_rows=len(data.held_out),
        total_steps=trainer.total_steps,
    )


def summarize_run(
    progress: Progress,
    train_s: float,
    eval_losses: tuple[float | None, float | None],
    memory: MemoryLog,
    exported: Path,
) -> RunSummary:
    """Returns what the run achieved.

    Ranks: all (collective).
    """
    peaks, of_host = (dist.gather_numbers(most) for most in (memory.highest, memory.host_highest))
    return RunSummary(
        steps=progress.steps,
        train_s=train_s,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        eval_loss_before=eval_losses[0],
        eval_loss_after=eval_losses[1],
        peak_memory_bytes=[int(peak) for peak in peaks],
        peak_host_bytes=[int(peak) for peak in of_host],
        adapter=str(exported),
    )
