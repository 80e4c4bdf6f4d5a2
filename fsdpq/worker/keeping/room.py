"""Room on the disk for what a run leaves: looked at before training, waited for at the end."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from fsdpq import dist
from fsdpq.errors import EnvironmentProblemError
from fsdpq.protocols import DTYPES, MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import AdamW8bitOptions, MuonOptions, SgdOptions
from fsdpq.training.loop import Trainer
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.keeping.watch import RankWatch

PATIENCE_S = 600.0
"""How long a run that is trained waits for room before it gives up."""
RETRY_S = 5.0
SPARE_BYTES = 1 << 20
"""For what lies beside the weights: configs, the tokenizer, the report."""


def trained_bytes(trainer: Trainer) -> int:
    """Returns the bytes of the trained weights of all ranks."""
    return sum(p.numel() * p.element_size() for p in trainer.parameters)


def checkpoint_bytes(recipe: Recipe, trainer: Trainer) -> int:
    """Returns about what a checkpoint takes: the trained weights and the optimizer's states."""
    optimizer = recipe.optimizer
    states = 2.0
    if isinstance(optimizer, AdamW8bitOptions):
        states = 0.52
    elif isinstance(optimizer, SgdOptions | MuonOptions):
        states = 1.0 if optimizer.momentum else 0.0
    return int(trained_bytes(trainer) * (1 + states))


def check_room(recipe: Recipe, trainer: Trainer, directory: Path, events: MetricSink) -> None:
    """Compares what the run will write with what is free; says where not all fits.

    Ranks: all.

    Raises:
        EnvironmentProblemError: there is no room for what was trained, not even once.
    """
    options, one = recipe.checkpoint, checkpoint_bytes(recipe, trainer)
    exported = trained_bytes(trainer) + SPARE_BYTES
    saves = options.interval is not None or options.interval_minutes is not None
    count = options.keep_last + 1 + options.keep_best if saves else 0
    free, needed = shutil.disk_usage(directory).free, exported + count * one
    hint = "make room, or put the run elsewhere with `--run-dir`"
    if free < exported:
        message = f"the disk of `{directory}` has {_size(free)} left, and what is trained takes "
        raise EnvironmentProblemError(message + _size(exported), hint=hint)
    if free < needed:
        text = (
            f"the disk of `{directory}` has {_size(free)} left, and {count} checkpoints of about "
        )
        text += f"{_size(one)} and what is exported take {_size(needed)}: {hint}"
        events.write({"event": "notice", "message": text})


def exported_bytes(recipe: Recipe, assembled: Assembled) -> int:
    """Returns about what the export takes: the trained weights, or the model in its dtype."""
    if recipe.export.format == "transformers":
        return assembled.num_parameters * DTYPES[recipe.model.dtype].itemsize + SPARE_BYTES
    trained = assembled.trainable
    return sum(p.numel() * p.element_size() for p in trained) + SPARE_BYTES


def wait_for_room(directory: Path, num_bytes: int, watch: RankWatch, events: MetricSink) -> None:
    """Returns once ``num_bytes`` can be written into ``directory``, tried by writing them.

    Ranks meet in the export, where one that fails would leave the others waiting. A wish to end is
    a reason to give up.

    Ranks: all (collective); rank 0 writes.

    Raises:
        EnvironmentProblemError: they cannot, for `PATIENCE_S` or until a signal came.
    """
    watch.heartbeat.enter("export")
    deadline, is_told = time.monotonic() + PATIENCE_S, False
    while problem := dist.gather_texts(_probe(directory, num_bytes))[0]:
        agreed = watch.stop.ask(due=time.monotonic() > deadline)
        if agreed.due or agreed.stop:
            hint = f"make room for {_size(num_bytes)}; where there is a checkpoint, `fsdpq resume` "
            hint += "exports what is trained without training again"
            raise EnvironmentProblemError(f"what is trained cannot be written: {problem}", hint)
        if not is_told:
            text = f"what is trained cannot be written: {problem}; make room for "
            text += f"{_size(num_bytes)}: it is tried again every {RETRY_S:.0f} s for "
            text += f"{PATIENCE_S / 60:.0f} minutes"
            sys.stderr.write(text + "\n")
            events.write({"event": "notice", "message": text})
            is_told = True
        watch.heartbeat.beat_again()
        time.sleep(RETRY_S)


def _probe(directory: Path, num_bytes: int) -> str:
    """Writes that much and removes it; returns why that cannot be, on rank 0."""
    if dist.rank() != 0:
        return ""
    path = directory / ".room"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                os.pwrite(descriptor, bytes(SPARE_BYTES), 0)
        finally:
            os.close(descriptor)
            path.unlink()
    except OSError as error:
        return f"{directory}: {error.strerror or error}"
    return ""


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
