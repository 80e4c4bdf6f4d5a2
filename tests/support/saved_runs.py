"""What the ranks of the tests of checkpoints do: train, save on the way, go on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fsdpq.data.dealing.loader import Deal, EpochOrder, Loader
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_numbers, gather_whole, seed_everything
from fsdpq.run_files.paths import RunFiles
from fsdpq.training.loop import LoopState, Trainer
from fsdpq.worker.keeping.checkpoints import Checkpoints
from fsdpq.worker.keeping.run_state import RunState
from fsdpq.worker.setup import Data, build_trainer
from support import bases
from support.sharded import CPU, named_trained, whole_a
from support.tiny import random_rows, tiny_recipe

Sections = dict[str, dict[str, Any]]


@dataclass
class Told:
    """What a run wrote and what it left.

    Attributes:
        rows: of metrics.
        events: of events.jsonl.
        weights: all that is trained, whole, by transformers' names.
        initial: first values of adapters that changed the base, whole.
        first_a: every A before training.
        loader: where the loader was.
        residual: what is left of the base where an adapter changed it, whole.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    first_a: dict[str, Tensor] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)

    def steps(self, *, after: int = 0) -> list[dict[str, Any]]:
        """Returns the log lines of later steps, without what a clock or the machine says."""
        left_out = ("event", "tokens_per_s", "data_wait_s", "memory_bytes")
        rows = [row for row in self.rows if row["event"] == "step" and row["step"] > after]
        return [{k: v for k, v in row.items() if k not in left_out} for row in rows]

    def evaluations(self, *, after: int = 0) -> list[tuple[int, float]]:
        """Returns steps and held-out losses of later evaluations."""
        rows = [row for row in self.rows if row["event"] == "eval" and row["step"] > after]
        return [(row["step"], row["loss"]) for row in rows]

    def notices(self) -> list[str]:
        """Returns the messages to the user."""
        return [row["message"] for row in self.events if row["event"] == "notice"]


@dataclass
class Sink:
    """Takes rows into a list."""

    rows: list[dict[str, Any]]

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row."""
        self.rows.append(dict(row))


@dataclass
class Bench:
    """A run that is about to train.

    Attributes:
        trainer: built from the recipe.
        loader: of its rows.
        checkpoints: of its folder.
        told: what it writes.
    """

    trainer: Trainer
    loader: Loader
    checkpoints: Checkpoints
    told: Told


def build(
    model: Path,
    folder: Path,
    sections: Sections,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    base: Path | None = None,
) -> Bench:
    """Returns a run of the tiny recipe, before its first step.

    Ranks: all (collective).
    """
    recipe, told = tiny_recipe(**sections), Told()
    seed_everything(recipe.training.seed)
    assembled = bases.assemble_from(base, model, sections)
    told.first_a = whole_a(assembled)
    events = Sink(told.events)
    trainer = build_trainer(
        recipe, assembled, Data(rows, held_out), Sink(told.rows), events,
        files=RunFiles(folder), device=CPU,
    )  # fmt: skip
    seed = recipe.training.seed
    order = EpochOrder(rows, seed=seed, digest="rows", shuffle=True)
    size = recipe.training.global_batch_size or 0
    num_rows = None if recipe.training.steps else round((recipe.training.epochs or 1) * len(rows))
    micro_batch_size = recipe.training.micro_batch_size
    deal = Deal(size, micro_batch_size, dist.get_rank(), dist.get_world_size(), num_rows)
    loader = Loader(order, deal)
    loader.start()
    run = RunState(assembled, trainer, loader, seed)
    checkpoints = Checkpoints(recipe, folder, run, base={}, events=events)
    return Bench(trainer, loader, checkpoints, told)


def train_on(
    model: Path,
    folder: Path,
    sections: Sections,
    *,
    resume: bool = False,
    num_rows: int = 7,
    longest: int = 16,
    held_out: int = 0,
    change: Callable[[Bench], Trainer] | None = None,
    base: Path | None = None,
) -> Told:
    """Trains to the end, saving as the recipe says; what it wrote and left.

    Ranks: all (collective).

    Args:
        model: directory of the base.
        folder: of the checkpoints.
        sections: of the tiny recipe.
        resume: go on from the newest whole checkpoint.
        num_rows: of an epoch.
        longest: row, in tokens.
        held_out: rows for evaluation.
        change: returns another trainer, before training or the restore.
        base: a quantized base to load from.
    """
    rows = random_rows(num_rows, seed=5, longest=longest)
    others = random_rows(held_out, seed=6, longest=longest)
    bench = build(model, folder, sections, rows, others, base)
    trainer = bench.trainer if change is None else change(bench)
    state = bench.checkpoints.restore() if resume else None

    def after_step(state: LoopState) -> bool:
        checkpoints = bench.checkpoints
        passed = any(gather_numbers(float(checkpoints.minutes_passed())))
        if checkpoints.is_due(state, minutes_passed=passed):
            checkpoints.start(state)
        return False

    with bench.loader:
        bench.checkpoints.begin()
        replace(trainer, after_step=after_step).run(bench.loader, state or LoopState())
        bench.told.loader = bench.loader.state_dict()
    bench.checkpoints.finish()
    _keep_weights(bench)
    return bench.told


def _keep_weights(bench: Bench) -> None:
    run: Any = bench.checkpoints._run  # pyright: ignore[reportPrivateUsage]
    told = bench.told
    named = named_trained(run.assembled).items()
    told.weights = {name: gather_whole(value).clone() for name, value in named}
    for name, layer in run.assembled.adapted_layers.items():
        if layer.initial:
            told.residual[name] = gather_whole(layer.base.weight).clone()
            told.initial[name] = layer.initial["lora_A"].clone()
