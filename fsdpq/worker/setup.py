"""Turns recipe and data into a trainer: rows, steps, optimizer, schedule, loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.data.loader import Step, build_step, iterate_steps, split_rows
from fsdpq.data.prepared import open_prepared
from fsdpq.data.tokenize import Row, make_dummy_rows
from fsdpq.errors import DamagedDataError, Problem, RecipeError
from fsdpq.metrics.profile import StepProfiler
from fsdpq.protocols import MetricSink
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.rows.report import DataReport
from fsdpq.run_files import RunFiles
from fsdpq.training.loop import Trainer
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import evaluate
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.from_disk import base_watch
from fsdpq.worker.tokenizer import check_context


@dataclass(frozen=True)
class Data:
    """Tokenized rows, packed where the recipe says so, the same on every rank."""

    train: Sequence[Row]
    held_out: Sequence[Row]


def load_data(
    recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, events: MetricSink
) -> Data:
    """Maps the rows that the launcher had prepared; says what was cut, left out or packed.

    Made-up rows (``data.format: dummy``) are made here.

    Ranks: all (collective).

    Raises:
        DamagedDataError: the prepared data is not what was written, or was made again meanwhile.
    """
    options = recipe.data
    check_context(options.seq_len, inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    if options.format == "dummy":
        return _make_up_rows(recipe, tokenizer)
    if inputs.prepared is None:
        raise RuntimeError("this run directory names no prepared data")
    prepared = open_prepared(inputs.prepared.directory)
    dist.check_same_on_all_ranks("the prepared data", prepared.digest)
    if prepared.digest != inputs.prepared.digest:
        message = f"the prepared data {inputs.prepared.directory} was made again, with other rows"
        raise DamagedDataError(message, hint="start again")
    for message in list_notices(prepared.report):
        events.write({"event": "notice", "message": message})
    return Data(prepared.train, prepared.held_out)


def _make_up_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    made_up = make_dummy_rows(tokenizer, recipe.data)
    dist.check_same_on_all_ranks("the data", made_up.digest())
    return split_data(made_up.rows, recipe.data.eval_fraction, recipe.training.seed)


def list_notices(report: DataReport) -> list[str]:
    """Returns what was done to rows, one sentence each."""
    sources = [*report.sources, *([report.eval] if report.eval is not None else [])]
    longer = f"longer than {report.seq_len} tokens"
    notices: list[str] = []
    for source in sources:
        of = f" of {source.name}" if len(sources) > 1 else ""
        counts = [
            (source.num_cut, f"are {longer}: cut"),
            (source.num_too_long, f"are {longer}: left out"),
            (source.num_untrained, "have no token that carries loss: left out"),
            (source.num_bad, "are bad: left out"),
        ]
        notices += [f"{count} rows{of} {what}" for count, what in counts if count]
    if report.fill is not None:
        notices.append(
            f"packed {report.num_train_rows} training rows into {report.num_sequences} sequences "
            f"of {report.seq_len} tokens, {report.fill:.1%} filled"
        )
    return notices


def split_data(rows: list[Row], eval_fraction: float, seed: int) -> Data:
    """Holds out made-up rows for evaluation."""
    train_ids, eval_ids = split_rows(len(rows), eval_fraction, seed)
    return Data([rows[i] for i in train_ids], [rows[i] for i in eval_ids])


def build_trainer(
    recipe: Recipe,
    assembled: Assembled,
    data: Data,
    metrics: MetricSink,
    events: MetricSink,
    *,
    files: RunFiles,
    device: torch.device,
) -> Trainer:
    """Builds optimizer, schedule and loop."""
    profile, trace = recipe.metrics.profile, files.profile(dist.rank())
    total_steps = count_steps(recipe, len(data.train))
    parameters = assembled.trainable
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    build_schedule = resolve_builder("lr_scheduler", recipe.lr_scheduler)
    held_out = held_out_steps(recipe, data)
    router_loss = assembled.model.router_loss
    return Trainer(
        model=assembled.model,
        parameters=parameters,
        optimizer=build_optimizer(recipe.optimizer, assembled.named_trainable),
        schedule=build_schedule(recipe.lr_scheduler, total_steps=total_steps),
        options=recipe.training,
        total_steps=total_steps,
        log_interval=recipe.metrics.log_interval,
        metrics=metrics,
        evaluate=(lambda: evaluate(assembled.model, held_out, device=device)) if held_out else None,
        device=device,
        scaler=LossScaler() if precision_of(recipe).scales_loss else None,
        no_sync=recipe.fsdp.no_sync,
        profiler=StepProfiler(profile, trace, device) if profile else None,
        log_memory=recipe.metrics.log_memory,
        router_aux_loss_coef=router_loss.coefficient if router_loss else 0.0,
        check_base=base_watch(assembled.mapped_base, events, device),
    )


def count_steps(recipe: Recipe, num_train_rows: int) -> int:
    """Returns the optimizer steps of the run.

    Raises:
        RecipeError: warmup and decay take more steps than that.
    """
    if recipe.training.steps is not None:
        return recipe.training.steps
    rows = (recipe.training.epochs or 1.0) * num_train_rows
    steps = max(1, math.ceil(rows / rows_per_step(recipe)))
    warmup = recipe.lr_scheduler.num_warmup_steps(steps)
    if warmup >= steps:
        message = f"`lr_scheduler.warmup_steps` is {warmup}, and {num_train_rows} rows make "
        message += f"{steps} steps"
        hint = "lower `lr_scheduler.warmup_steps`, or raise `training.epochs`"
        raise RecipeError([Problem(message, "lr_scheduler.warmup_steps", None, hint)])
    decay = recipe.lr_scheduler.num_decay_steps(steps)
    if warmup + decay > steps:
        message = f"`lr_scheduler` warms up for {warmup} steps and decays for {decay}, and "
        message += f"{num_train_rows} rows make {steps} steps"
        hint = "lower `lr_scheduler.decay_steps` or the warmup, or raise `training.epochs`"
        raise RecipeError([Problem(message, "lr_scheduler", None, hint)])
    return steps


def rows_per_step(recipe: Recipe) -> int:
    """Returns the rows of a step over all ranks; the launcher made the number concrete."""
    size = recipe.training.global_batch_size
    if size is None:
        raise RuntimeError("`training.global_batch_size` is null: this recipe is not resolved")
    return size


def steps_of_rank(recipe: Recipe, data: Data) -> Iterator[Step]:
    """Returns this rank's endless iterator of training steps."""
    return iterate_steps(
        data.train,
        global_batch_size=rows_per_step(recipe),
        micro_batch_size=recipe.training.micro_batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        seed=recipe.training.seed,
    )


def held_out_steps(recipe: Recipe, data: Data) -> list[Step]:
    """Returns this rank's part of the held-out rows."""
    size = recipe.training.micro_batch_size * dist.world_size()
    rows = sorted(data.held_out, key=lambda row: len(row.input_ids))
    return [
        build_step(
            rows[start : start + size],
            micro_batch_size=recipe.training.micro_batch_size,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
        for start in range(0, len(rows), size)
    ]
