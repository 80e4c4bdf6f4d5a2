"""A run over whole epochs equals plain torch, and so does one that goes on with other ranks.

Seven rows in steps of three for two epochs are five steps, the last one of two rows. The reference
takes the same rows one by one, in one process, with SGD. `test_saved_optimizers` compares
optimizers that have states.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support import library_models, reference
from support.ranks import RankPool
from support.saved_runs import Sections, Told, train_on
from support.tiny import random_rows, save_tiny_llama
from torch import Tensor

from fsdpq.data.dealing.order import epoch_order
from fsdpq.data.text.tokenize import Row
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints

LR = 0.3
SEED = 11
BATCH = 3
EPOCHS = 2.0
STEPS = 5
SAVED = 2
SECTIONS: Sections = {
    "optimizer": {"kind": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.0},
    "training": {
        "steps": None, "epochs": EPOCHS, "global_batch_size": BATCH, "micro_batch_size": 1,
        "max_grad_norm": None, "seed": SEED,
    },
    "metrics": {"log_interval": 1},
    "checkpoint": {"interval": SAVED, "keep_last": 9},
}  # fmt: skip


def rows() -> list[Row]:
    """Returns the rows of an epoch."""
    return random_rows(7, seed=5, longest=16)


@dataclass
class Run:
    """What the reference did.

    Attributes:
        losses: of every step.
        weights: all that is trained, after them.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


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


def losses_of(told: Told) -> list[float]:
    """Returns the loss of every step."""
    return [row["loss"] for row in told.steps()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_two_epochs_with_a_last_partial_step_equal_plain_torch_also_resumed(
    ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    whole = ranks.run(2, train_on, tiny, tmp_path, SECTIONS)[0]
    plain = run_plain(tiny, whole.first_a)
    assert len(plain.losses) == STEPS
    # fp32 sums in another order: 1e-5 is what the loop's own comparison with plain torch allows.
    assert losses_of(whole) == pytest.approx(plain.losses, rel=1e-5)
    for directory in list_checkpoints(tmp_path)[:-1]:
        shutil.rmtree(directory)
    resume = functools.partial(train_on, resume=True)
    second = ranks.run(3, resume, tiny, tmp_path, SECTIONS)[0]
    assert losses_of(second) == pytest.approx(plain.losses[SAVED:], rel=1e-5)
    assert second.loader == whole.loader
    for name, value in plain.weights.items():
        moved = (value - whole.first_a.get(name.removesuffix(".lora_A"), 0)).norm()
        assert (second.weights[name] - value).norm() < 1e-3 * moved
