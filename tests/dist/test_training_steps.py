"""The training loop equals plain torch step by step: learning rate, loss, norm and weights.

The reference accumulates gradients row by row in one process, clips them by
`torch.nn.utils.clip_grad_norm_`, and takes steps of the library's optimizer under torch's own
schedulers. SGD shows the size of a gradient, which Adam divides away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.optim import AdamW8bit
from support import bases, library_models, reference
from support.ranks import RankPool
from support.sharded import CPU, named_trained, whole_a
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor
from torch.optim import lr_scheduler

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.setup import Data, build_trainer

Sections = dict[str, dict[str, Any]]

NUM_STEPS = 6
BATCH = 5


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH, seed=5, longest=16)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


@dataclass
class Steps:
    """What every step did.

    Attributes:
        lrs: learning rates.
        losses: mean token losses.
        norms: gradient norms before clipping.
        weights: of all that is trained, after the step.
        initial: first values of every A, or of all that is trained.
    """

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of the metrics; see `fsdpq.protocols.MetricSink`."""
        if row["event"] == "step":
            self.lrs.append(row["lr"])
            self.losses.append(row["loss"])
            self.norms.append(row["grad_norm"])


def run_loop(directory: Path, sections: Sections) -> Steps:
    """Trains by the recipe's own loop, optimizer and schedule."""
    sections = {"metrics": {"log_interval": 1}} | sections
    assembled = bases.assemble_from(None, directory, sections)
    recipe = tiny_recipe(**sections)
    steps = Steps(initial=whole_a(assembled))
    trainer = build_trainer(
        recipe, assembled, Data([], []), steps, steps, files=RunFiles(directory), device=CPU
    )

    def record(*_: Any) -> None:
        named = named_trained(assembled)
        steps.weights.append({name: gather_whole(p).clone() for name, p in named.items()})

    trainer.optimizer.register_step_post_hook(record)
    trainer.run(
        build_step(
            rows,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        for rows in batches()
    )
    return steps


def run_each(directory: Path, cases: dict[str, Sections]) -> dict[str, Steps]:
    """Trains one recipe after the other."""
    return {name: run_loop(directory, sections) for name, sections in cases.items()}


@dataclass(frozen=True)
class Plain:
    """What plain torch is to do.

    Attributes:
        optimizer: of the parameters.
        scheduler: of the optimizer.
        max_norm: for `clip_grad_norm_`; infinity clips nothing.
        fp16: under autocast, with `torch.amp.GradScaler`.
    """

    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
    max_norm: float
    fp16: bool


def run_plain(directory: Path, initial_a: dict[str, Tensor], plain: Plain) -> Steps:
    """Trains PEFT's LoRA on the dequantized model, in one process."""
    adapter = {"kind": "lora", "rank": 4}
    model = library_models.build(directory, adapter, {"kind": "bnb"}, initial_a)
    named = library_models.named_trained(model)
    parameters: list[Tensor] = list(named.values())
    optimizer = plain.optimizer(parameters)
    scheduler = plain.scheduler(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=plain.fp16)
    steps = Steps(initial={name: p.detach().clone() for name, p in named.items()})
    for rows in batches():
        num_trained, loss = sum(row.num_trained for row in rows), 0.0
        for row in rows:
            with torch.autocast("cpu", torch.float16) if plain.fp16 else nullcontext():
                share = reference.batch_loss(model, [row]) * (row.num_trained / num_trained)
            scaler.scale(share).backward()
            loss += share.item()
        scaler.unscale_(optimizer)
        steps.norms.append(torch.nn.utils.clip_grad_norm_(parameters, plain.max_norm).item())
        steps.lrs.append(optimizer.param_groups[0]["lr"])
        steps.losses.append(loss)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        steps.weights.append({name: p.detach().clone() for name, p in named.items()})
    return steps


WARMUP = 2
FLOOR = 0.1
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant", "warmup_steps": WARMUP},
    "linear": {"kind": "linear", "warmup_steps": WARMUP, "min_lr_ratio": FLOOR},
    "cosine": {"kind": "cosine", "warmup_steps": WARMUP, "min_lr_ratio": FLOOR},
    "wsd": {"kind": "wsd", "warmup_steps": WARMUP, "min_lr_ratio": FLOOR, "decay_steps": 3},
}


def scheduled(kind: str, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Returns torch's schedulers for one of `SCHEDULES`."""
    warmup = lr_scheduler.LinearLR(optimizer, 1 / (WARMUP + 1), 1.0, total_iters=WARMUP)
    if kind == "constant":
        return warmup
    start = 3 if kind == "wsd" else WARMUP
    decay: lr_scheduler.LRScheduler
    if kind == "cosine":
        lowest = FLOOR * optimizer.param_groups[0]["initial_lr"]
        decay = lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS - start, lowest)
    else:
        decay = lr_scheduler.LinearLR(optimizer, 1.0, FLOOR, total_iters=NUM_STEPS - start)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[start])


@dataclass(frozen=True)
class Case:
    """One recipe and what it must equal.

    Attributes:
        optimizer: the recipe's section.
        reference: the library's optimizer.
        schedule: one of `SCHEDULES`.
        max_norm: ``training.max_grad_norm``.
        fsdp: the recipe's section.
        micro_batch_size: on two ranks five rows make one micro-batch of 4, two of 2, three of 1.
        rel: of losses and norms.
        moved: bound on the difference of a weight, as a share of how far it has moved.
    """

    optimizer: dict[str, Any]
    reference: Callable[[list[Tensor]], torch.optim.Optimizer]
    schedule: str
    max_norm: float | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 4
    rel: float = 1e-5
    moved: float = 1e-3

    @property
    def sections(self) -> Sections:
        """The recipe's sections."""
        training = {"micro_batch_size": self.micro_batch_size, "max_grad_norm": self.max_norm}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": SCHEDULES[self.schedule],
            "training": training | {"steps": NUM_STEPS},
            "fsdp": self.fsdp,
        }

    @property
    def plain(self) -> Plain:
        """What plain torch is to do."""
        limit = float("inf") if self.max_norm is None else self.max_norm
        fp16 = self.fsdp.get("precision") == "fp16_autocast"
        return Plain(self.reference, lambda o: scheduled(self.schedule, o), limit, fp16)


def sgd(**options: Any) -> tuple[dict[str, Any], Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Returns SGD with momentum for both sides."""
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.0} | options
    return {"kind": "sgd", **options}, lambda p: torch.optim.SGD(p, **options)


CLIP = 0.7
"""Below some of the norms and above others."""
DECAYED: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
FP16 = {"precision": "fp16_autocast"}

CASES: dict[str, Case] = {
    "cosine": Case(*sgd(), "cosine", CLIP, micro_batch_size=2),
    "no_sync": Case(*sgd(), "cosine", CLIP, {"no_sync": True}, 1),
    "nesterov": Case(*sgd(nesterov=True, weight_decay=0.1), "constant"),
    # fp16 keeps 11 bits. Scaled gradients are thousands of times the limit.
    "fp16": Case(*sgd(), "cosine", CLIP, FP16, rel=2e-3, moved=2e-2),
    "adamw": Case(
        {"kind": "adamw"} | DECAYED, lambda p: torch.optim.AdamW(p, **DECAYED), "linear", CLIP
    ),
    "adam": Case({"kind": "adam"} | DECAYED, lambda p: torch.optim.Adam(p, **DECAYED), "wsd"),
    "adadelta": Case(
        {"kind": "adadelta", "lr": 1.0, "weight_decay": 0.1},
        lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
        "constant",
    ),
    "adamw_8bit": Case(
        {"kind": "adamw_8bit"} | DECAYED, lambda p: AdamW8bit(p, **DECAYED), "constant"
    ),
    # Muon makes orthogonal in bf16 (2^-8 a rounding, five rounds a step) what other orders of sums
    # make different in fp32; test_optimizers gives it the same gradients.
    "muon": Case(
        {"kind": "muon"} | DECAYED,
        lambda p: torch.optim.Muon(p, **DECAYED, adjust_lr_fn="match_rms_adamw"),  # pyright: ignore
        "constant",
        rel=1e-3,
        moved=5e-2,
    ),
}
ON_MORE: dict[int, dict[str, Case]] = {
    3: {"shard_grad_op": Case(*sgd(), "cosine", CLIP, {"strategy": "shard_grad_op"}, 1)},
    4: {
        "hybrid": Case(
            *sgd(), "cosine", CLIP,
            {"strategy": "hybrid_full_shard", "offload": "cpu", "no_sync": True}, 1,
        )
    },
}  # fmt: skip
RANKS = {2: CASES, **ON_MORE}


class Runs:
    """Trains all cases of so many ranks when the first is asked for."""

    def __init__(self, ranks: RankPool, root: Path) -> None:
        directory = save_tiny_llama(root, num_hidden_layers=2)

        def sharded(num_ranks: int) -> list[dict[str, Steps]]:
            cases = {name: case.sections for name, case in RANKS[num_ranks].items()}
            return ranks.run(num_ranks, run_each, directory, cases)

        self.sharded = cache(sharded)
        self.directory = directory


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("steps"))


def _check_weights(ours: Steps, theirs: Steps, moved: float) -> None:
    for mine, reference_weights in zip(ours.weights, theirs.weights, strict=True):
        assert mine.keys() == reference_weights.keys()
        for name, weight in reference_weights.items():
            way = (weight - theirs.initial[name]).norm()
            off = (mine[name] - weight).norm()
            # Where nothing moved yet, as A does not before B does, rounding of the weight itself.
            assert off <= moved * way + 1e-7 * weight.norm(), name


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(size, name) for size, cases in RANKS.items() for name in cases]
)
def test_every_step_is_plain_torchs(runs: Runs, num_ranks: int, name: str) -> None:
    case, answers = RANKS[num_ranks][name], runs.sharded(num_ranks)
    theirs = run_plain(runs.directory, answers[0][name].initial, case.plain)
    if case.max_norm is not None:
        assert min(theirs.norms) < case.max_norm < max(theirs.norms), "clipping is seen"
    for answer in answers:
        ours = answer[name]
        assert ours.lrs == pytest.approx(theirs.lrs, rel=1e-9)
        # fp32 sums in another order, through six steps.
        assert ours.losses == pytest.approx(theirs.losses, rel=case.rel)
        assert ours.norms == pytest.approx(theirs.norms, rel=case.rel)
        _check_weights(ours, theirs, case.moved)
