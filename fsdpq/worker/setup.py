"""Turns recipe and data into a trainer: rows, steps, optimizer, schedule, loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.data.dealing.loader import EpochOrder, RowOrder, split_rows
from fsdpq.data.dealing.stream import RowStream
from fsdpq.data.preparing.prepared import open_prepared
from fsdpq.data.text.tokenize import Row, digest_rows, make_dummy_rows
from fsdpq.errors import DamagedDataError
from fsdpq.metrics.profile import StepProfiler
from fsdpq.protocols import MetricSink
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.rows.report import DataReport
from fsdpq.run_files.paths import RunFiles
from fsdpq.training.loop import Trainer
from fsdpq.training.scaler import LossScaler
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.from_disk import base_watch
from fsdpq.worker.steps import build_evaluation, count_steps
from fsdpq.worker.stream import open_stream
from fsdpq.worker.tokenizer import check_context


@dataclass(frozen=True)
class Data:
    """Tokenized rows, packed where the recipe says so, the same on every rank.

    Attributes:
        train: rows of one epoch.
        held_out: rows for evaluation.
        digest: hash of all rows.
        stream: rows that come while training, instead of ``train``.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    digest: str = ""
    stream: RowStream | None = None

    @property
    def num_train_rows(self) -> int:
        """Rows of one epoch; of a stream those that are read."""
        return len(self.train) if self.stream is None else self.stream.rows_per_epoch

    def order(self, recipe: Recipe) -> RowOrder:
        """Returns the rows of training in the order that the recipe asks for."""
        if self.stream is not None:
            return self.stream
        seed, shuffle = recipe.training.seed, recipe.data.shuffle
        return EpochOrder(self.train, seed=seed, digest=self.digest, shuffle=shuffle)


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
    if options.streaming:
        if inputs.data is None:
            raise RuntimeError("this run directory names no data")
        stream, held_out = open_stream(recipe, inputs.data, tokenizer, events)
        return Data([], held_out, stream.digest, stream)
    if inputs.prepared is None:
        raise RuntimeError("this run directory names no prepared data")
    prepared = open_prepared(inputs.prepared.directory)
    dist.check_same_on_all_ranks("the prepared data", prepared.digest)
    if prepared.digest != inputs.prepared.digest:
        message = f"the prepared data {inputs.prepared.directory} was made again, with other rows"
        raise DamagedDataError(message, hint="start again")
    for message in list_notices(prepared.report):
        events.write({"event": "notice", "message": message})
    return Data(prepared.train, prepared.held_out, prepared.digest)


def _make_up_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    made_up = make_dummy_rows(tokenizer, recipe.data)
    digest = digest_rows(made_up)
    dist.check_same_on_all_ranks("the data", digest)
    split = split_data(made_up, recipe.data.eval_fraction, recipe.training.seed)
    return dataclasses.replace(split, digest=digest)


def list_notices(report: DataReport) -> list[str]:
    """Returns what was done to rows, one sentence each."""
    sources = [*report.sources, *([report.eval] if report.eval is not None else [])]
    notices: list[str] = []
    for source in sources:
        of = f" of {source.name}" if len(sources) > 1 else ""
        notices += source.sentences(report.seq_len, of=of)
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
    breaks_off: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Builds optimizer, schedule and loop; ``breaks_off`` ends an evaluation."""
    profile, trace = recipe.metrics.profile, files.profile(dist.rank())
    total_steps = count_steps(recipe, data.num_train_rows)
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
        evaluate=build_evaluation(recipe, assembled.model, data.held_out, device, breaks_off),
        device=device,
        scaler=LossScaler() if precision_of(recipe).scales_loss else None,
        no_sync=recipe.fsdp.no_sync,
        profiler=StepProfiler(profile, trace, device) if profile else None,
        router_aux_loss_coef=router_loss.coefficient if router_loss else 0.0,
        check_base=base_watch(assembled.mapped_base, events, device),
    )
