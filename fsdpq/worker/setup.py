"""Turns recipe and data into a trainer: rows, steps, optimizer, schedule, loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.data.loader import split_rows
from fsdpq.data.pack import fill_rate, pack_rows
from fsdpq.data.tokenize import Row, TokenizedData, make_dummy_rows, tokenize_rows
from fsdpq.errors import Problem, RecipeError
from fsdpq.metrics.profile import StepProfiler
from fsdpq.model.meta import read_config
from fsdpq.protocols import MetricSink
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.registry import resolve_builder
from fsdpq.rows.read import read_rows
from fsdpq.rows.source import DataSources
from fsdpq.run_files import RunFiles
from fsdpq.training.loop import Trainer
from fsdpq.training.scaler import LossScaler
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.from_disk import base_watch
from fsdpq.worker.steps import build_evaluation, count_steps


@dataclass(frozen=True)
class Data:
    """Tokenized rows, packed where the recipe says so, the same on every rank.

    Attributes:
        train: rows of one epoch.
        held_out: rows for evaluation.
        digest: hash of all rows.
    """

    train: list[Row]
    held_out: list[Row]
    digest: str = ""


def load_data(
    recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, events: MetricSink
) -> Data:
    """Reads, tokenizes, splits and packs the rows; says what was cut, dropped or packed.

    Every rank does all of it: simple, and the ranks compare a hash of the result.

    Ranks: all (collective).
    """
    options = recipe.data
    check_context(options.seq_len, inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    (source,) = _sources(inputs).train
    if source.files:
        rows = (row.content for row in read_rows(source, on_bad_row=options.on_bad_row))
        tokenized = tokenize_rows(rows, tokenizer, options)
    else:
        tokenized = make_dummy_rows(tokenizer, options)
    digest = tokenized.digest()
    dist.check_same_on_all_ranks("the data", digest)
    notices = list_notices(tokenized, options)
    data = split_data(tokenized.rows, options.eval_fraction, recipe.training.seed)
    if options.packing == "best_fit":
        data, notice = pack_data(data, options.seq_len)
        notices.append(notice)
    for message in notices:
        events.write({"event": "notice", "message": message})
    return dataclasses.replace(data, digest=digest)


def _sources(inputs: Inputs) -> DataSources:
    if inputs.data is None:
        raise RuntimeError("this run directory names no data")
    return inputs.data


def list_notices(tokenized: TokenizedData, options: DataOptions) -> list[str]:
    """Returns what was done to rows, one sentence each."""
    longer = f"longer than {options.seq_len} tokens"
    place = " at their start" if options.truncation == "truncate_start" else ""
    counts = [
        (tokenized.num_cut, f"{longer}: cut{place}"),
        (tokenized.num_too_long, f"{longer}: left out"),
    ]
    notices = [f"{count} rows are {what}" for count, what in counts if count]
    if tokenized.num_untrained:
        notices.append(f"{tokenized.num_untrained} rows have no token that carries loss: left out")
    return notices


def split_data(rows: list[Row], eval_fraction: float, seed: int) -> Data:
    """Holds out rows for evaluation.

    Raises:
        RecipeError: there is one row only, and rows are to be held out.
    """
    if eval_fraction and len(rows) < 2:
        hint = "add rows, or set data.eval_fraction=0"
        raise RecipeError([Problem("one row cannot be split for evaluation", "data", None, hint)])
    train_ids, eval_ids = split_rows(len(rows), eval_fraction, seed)
    return Data([rows[i] for i in train_ids], [rows[i] for i in eval_ids])


def pack_data(data: Data, seq_len: int) -> tuple[Data, str]:
    """Returns the rows packed into sequences, and a sentence that says how well they fill them."""
    packed = Data(pack_rows(data.train, seq_len), pack_rows(data.held_out, seq_len))
    notice = f"packed {len(data.train)} training rows into {len(packed.train)} sequences of "
    notice += f"{seq_len} tokens, {fill_rate(packed.train, seq_len):.1%} filled"
    return packed, notice


def check_context(seq_len: int, model_dir: Path, *, trust_remote_code: bool = False) -> None:
    """Raises `RecipeError` where rows may be longer than the model was made for."""
    config = read_config(model_dir, trust_remote_code=trust_remote_code).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        message = f"`data.seq_len` is {seq_len}, the model's context is {longest} tokens"
        hint = f"use data.seq_len={longest} or less"
        raise RecipeError([Problem(message, "data.seq_len", None, hint)])


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
        evaluate=build_evaluation(recipe, assembled.model, data.held_out, device),
        device=device,
        scaler=LossScaler() if precision_of(recipe).scales_loss else None,
        no_sync=recipe.fsdp.no_sync,
        profiler=StepProfiler(profile, trace, device) if profile else None,
        log_memory=recipe.metrics.log_memory,
        router_aux_loss_coef=router_loss.coefficient if router_loss else 0.0,
        check_base=base_watch(assembled.mapped_base, events, device),
    )
