"""A run over whole epochs equals plain torch, and so does one that goes on with other ranks.

Seven rows in steps of three for two epochs are five steps, the last one of two rows. The reference
takes the same rows one by one, in one process, with SGD, whose only state are the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import bases, library_models, reference
from support.ranks import RankPool
from support.sharded import CPU, named_trained, whole_a
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor

from fsdpq.data.dealing.loader import Deal, EpochOrder, Loader
from fsdpq.data.dealing.order import epoch_order
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import assign_own_rows, gather_whole
from fsdpq.run_files import RunFiles
from fsdpq.training.loop import Trainer
from fsdpq.worker.setup import Data, build_trainer

LR = 0.3
SEED = 11
BATCH = 3
EPOCHS = 2.0
STEPS = 5
SECTIONS: dict[str, dict[str, Any]] = {
    "optimizer": {"kind": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.0},
    "training": {
        "steps": None, "epochs": EPOCHS, "global_batch_size": BATCH, "micro_batch_size": 1,
        "max_grad_norm": None, "seed": SEED,
    },
    "metrics": {"log_interval": 1},
}  # fmt: skip


def rows() -> list[Row]:
    """Returns the rows of an epoch."""
    return random_rows(7, seed=5, longest=16)


@dataclass
class Run:
    """What some steps did.

    Attributes:
        losses: of every step.
        weights: all that is trained, after them.
        state: of the loader, after them.
        initial: first value of every A.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of the metrics; see `fsdpq.protocols.MetricSink`."""
        if row["event"] == "step":
            self.losses.append(row["loss"])


def run_steps(directory: Path, num_steps: int, after: Run | None) -> Run:
    """Trains for some steps, from the start or after another run."""
    recipe = tiny_recipe(**SECTIONS)
    assembled = bases.assemble_from(None, directory, SECTIONS)
    run = Run(initial=whole_a(assembled))
    named = named_trained(assembled)
    data = Data(rows(), [])
    trainer = build_trainer(
        recipe, assembled, data, run, run, files=RunFiles(directory), device=CPU
    )
    assert trainer.total_steps == STEPS
    order = EpochOrder(data.train, seed=SEED, digest="rows", shuffle=True)
    deal = Deal(BATCH, 1, dist.get_rank(), dist.get_world_size(), round(EPOCHS * len(data.train)))
    with Loader(order, deal) as loader:
        if after is not None:
            loader.load_state_dict(after.state)
            for name, parameter in named.items():
                assign_own_rows(parameter, after.weights[name])
        _first(trainer, num_steps).run(loader)
        run.state = loader.state_dict()
    run.weights = {name: gather_whole(value).clone() for name, value in named.items()}
    return run


def _first(trainer: Trainer, num_steps: int) -> Trainer:
    return Trainer(**{**vars(trainer), "total_steps": num_steps})


def run_plain(directory: Path, initial_a: dict[str, Tensor]) -> Run:
    """Trains PEFT's LoRA on the dequantized model, in one process."""
    adapter = {"kind": "lora", "rank": 4}
    model = library_models.build(directory, adapter, {"kind": "bnb"}, initial_a)
    named = library_models.named_trained(model)
    optimizer = torch.optim.SGD(list(named.values()), lr=LR)
    run, all_rows = Run(), rows()
    places = [
        place
        for epoch in (1, 2)
        for place in epoch_order(len(all_rows), seed=SEED, epoch=epoch).tolist()
    ]
    for start in range(0, len(places), BATCH):
        loss = reference.batch_loss(model, [all_rows[p] for p in places[start : start + BATCH]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
    run.weights = {name: p.detach().clone() for name, p in named.items()}
    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_two_epochs_with_a_last_partial_step_equal_plain_torch_also_resumed(
    ranks: RankPool, tiny: Path
) -> None:
    whole = ranks.run(2, run_steps, tiny, STEPS, None)[0]
    plain = run_plain(tiny, whole.initial)
    assert len(plain.losses) == STEPS
    # fp32 sums in another order: 1e-5 is what the loop's own comparison with plain torch allows.
    assert whole.losses == pytest.approx(plain.losses, rel=1e-5)
    first = ranks.run(2, run_steps, tiny, 2, None)[0]
    second = ranks.run(3, run_steps, tiny, STEPS - 2, first)[0]
    assert first.losses + second.losses == pytest.approx(plain.losses, rel=1e-5)
    assert second.state == whole.state
    for name, value in plain.weights.items():
        moved = (value - whole.initial.get(name.removesuffix(".lora_A"), 0)).norm()
        assert (second.weights[name] - value).norm() < 1e-3 * moved
