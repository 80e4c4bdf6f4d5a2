"""Sharded training equals one unsharded process, however ranks and micro-batches share the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.optim import AdamW8bit
from support import reference
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from torch import Tensor, nn

from fsdpq.data.loader import build_step
from fsdpq.data.tokenize import Row
from fsdpq.dist import assign_own_rows, check_same_on_all_ranks
from fsdpq.errors import TrainingError
from fsdpq.registry import resolve_builder
from fsdpq.training.step import train_step
from fsdpq.worker.assemble import Assembled

NUM_STEPS = 3
BATCH = 8
LR = 1e-3
MAX_NORM = 1.0


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _whole(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().full_tensor().clone()  # pyright: ignore[reportCallIssue]


def initial_adapter(assembled: Assembled) -> dict[str, Tensor]:
    """Returns every whole A."""
    layers = assembled.adapted_layers
    return {name: _whole(layer.lora_A) for name, layer in layers.items()}  # pyright: ignore[reportArgumentType]


def train_sharded(
    directory: Path, micro_batch_size: int, sections: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trains on this rank; returns losses, gradient norms and the initial adapter."""
    assembled = assemble(directory, **sections)
    initial = initial_adapter(assembled)
    losses, norms = train(
        assembled, batches(), micro_batch_size=micro_batch_size, lr=LR, max_norm=MAX_NORM
    )
    return {"initial": initial, "losses": losses, "norms": norms}


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_training_equals_unsharded_peft(
    ranks: RankPool, tmp_path: Path, tied: bool
) -> None:
    directory = save_tiny_llama(tmp_path, tied=tied)
    model = reference.load_dequantized(directory)
    expected: tuple[list[float], list[float]] | None = None
    for num_ranks in (1, 4):
        answers = ranks.run(num_ranks, train_sharded, directory, 2, {})
        if expected is None:
            peft_model = reference.with_peft_lora(model, answers[0]["initial"], rank=4)
            expected = reference.train(peft_model, batches(), lr=LR, max_norm=MAX_NORM)
            assert len(set(expected[0])) == NUM_STEPS
        for answer in answers:
            # fp32 sums in another order, amplified by three Adam steps: 1e-5 relative.
            assert answer["losses"] == pytest.approx(expected[0], rel=1e-5)
            assert answer["norms"] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"kind": "none"}},
        {"quantization": {"kind": "bnb", "modules_to_not_convert": ["o_proj"]}},
        {"adapter": {"rank": 2, "target_modules": ["q_proj", "mlp.down_proj"], "use_rslora": True}},
    ],
)
def test_three_ranks_equal_one_whatever_is_quantized_or_adapted(
    ranks: RankPool, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    directory = save_tiny_llama(tmp_path)
    one = ranks.run(1, train_sharded, directory, 4, sections)[0]
    three = ranks.run(3, train_sharded, directory, 2, sections)[0]
    assert len(set(one["losses"])) == NUM_STEPS
    assert three["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert three["norms"] == pytest.approx(one["norms"], rel=1e-5)


def differing_adapters() -> str:
    """Returns what the ranks say when each has a text of its own."""
    try:
        check_same_on_all_ranks("the adapters", f"rank {dist.get_rank()}")
    except TrainingError as error:
        return error.message
    return ""


def test_ranks_that_differ_are_noticed_by_all_of_them(ranks: RankPool) -> None:
    answers = ranks.run(3, differing_adapters)
    assert answers == ["the adapters differ between rank 0 and ranks [1, 2]"] * 3


def gradients(directory: Path, micro_batch_size: int) -> dict[str, Tensor]:
    """Returns the whole gradients of one step over seven uneven rows."""
    assembled = assemble(directory)
    torch.manual_seed(0)
    for layer in assembled.adapted_layers.values():
        # B away from zero, or A would have no gradient; all ranks draw the same whole matrix.
        whole = torch.randn(layer.lora_B.shape) * 0.1  # pyright: ignore[reportArgumentType, reportCallIssue]
        assign_own_rows(layer.lora_B, whole)  # pyright: ignore[reportArgumentType]
    step = build_step(
        random_rows(7, seed=3),
        micro_batch_size=micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    for batch in step.micro_batches:
        losses = assembled.model(batch.input_ids, batch.loss_positions, batch.targets)
        (losses / step.num_trained).backward()
    named = assembled.model.named_parameters()
    return {
        name: parameter.grad.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        for name, parameter in named
        if parameter.requires_grad and parameter.grad is not None
    }


def test_gradients_do_not_depend_on_the_split(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path)
    whole = ranks.run(1, gradients, directory, 7)[0]
    assert len(whole) == 2 * 7 * 3
    for num_ranks, micro_batch_size in [(1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 1)]:
        split = ranks.run(num_ranks, gradients, directory, micro_batch_size)[0]
        assert split.keys() == whole.keys()
        for name, gradient in whole.items():
            # fp32 rounding of sums in another order, relative to the largest entry.
            bound = 2e-6 * gradient.abs().max().item()
            assert torch.allclose(split[name], gradient, rtol=0, atol=bound), name


def train_with_optimizer(
    directory: Path, options: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Trains three steps with the recipe's own optimizer; returns A before, all weights after."""
    assembled = assemble(directory, optimizer=options)
    initial = initial_adapter(assembled)
    recipe = tiny_recipe(optimizer=options)
    optimizer = resolve_builder("optimizer", recipe.optimizer)(
        recipe.optimizer, assembled.named_trainable
    )
    for batch in batches():
        step = build_step(
            batch, micro_batch_size=4, rank=dist.get_rank(), world_size=dist.get_world_size()
        )
        train_step(
            assembled.model, step, optimizer=optimizer, parameters=assembled.trainable,
            max_grad_norm=None, device=CPU,
        )  # fmt: skip
    return initial, [_whole(parameter) for parameter in assembled.trainable]


@pytest.mark.parametrize(
    ("options", "reference_class", "arguments"),
    [
        ({"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1}, torch.optim.AdamW, {}),
        ({"kind": "adam", "lr": 1e-2, "weight_decay": 0.1}, torch.optim.Adam, {}),
        (
            {"kind": "sgd", "lr": 1e-1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True},
        ),
        ({"kind": "adadelta", "lr": 1.0, "weight_decay": 0.1}, torch.optim.Adadelta, {}),
        ({"kind": "adamw_8bit", "lr": 1e-2, "weight_decay": 0.1}, AdamW8bit, {}),
        (
            {"kind": "muon", "lr": 1e-2, "weight_decay": 0.1},
            torch.optim.Muon,
            {"adjust_lr_fn": "match_rms_adamw"},
        ),
    ],
    ids=["adamw", "adam", "sgd", "adadelta", "adamw_8bit", "muon"],
)
def test_every_optimizer_on_two_ranks_is_torchs_own(
    ranks: RankPool,
    tmp_path: Path,
    options: dict[str, Any],
    reference_class: Any,
    arguments: dict[str, Any],
) -> None:
    directory = save_tiny_llama(tmp_path)
    initial, trained = ranks.run(2, train_with_optimizer, directory, options)[0]
    model = reference.with_peft_lora(reference.load_dequantized(directory), initial, rank=4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = reference_class(parameters, lr=options["lr"], weight_decay=0.1, **arguments)
    for batch in batches():
        reference.batch_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(trained) == len(parameters)
    for ours, theirs in zip(trained, parameters, strict=True):
        # Where a gradient is near zero, Adam divides rounding by rounding: relative to the largest.
        # Muon makes orthogonal in bf16 (2^-8 a rounding, five rounds, three steps) what other
        # orders of sums make different in fp32; test_optimizers gives it the same gradients.
        bound = (5e-2 if options["kind"] == "muon" else 1e-3) * theirs.detach().abs().max().item()
        assert torch.allclose(ours, theirs.detach(), rtol=0, atol=bound)
