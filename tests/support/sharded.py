"""What the ranks of the tests do: assemble a tiny model and train it on given batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.model.loading.targets import checkpoint_name
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import Assembled, assemble_model
from support.tiny import tiny_recipe

CPU = torch.device("cpu")


def assemble(directory: Path, **sections: dict[str, Any]) -> Assembled:
    """Returns the tiny recipe's model, sharded over the ranks of the process group.

    Ranks: all (collective).
    """
    recipe = tiny_recipe(**sections)
    return assemble_model(recipe, directory, device=CPU, report_load=lambda _done, _total: None)


def named_trained(assembled: Assembled) -> dict[str, nn.Parameter]:
    """Returns the trained Parameters by transformers' names; an adapter's by its layer's name."""
    return {checkpoint_name(name): p for name, p in assembled.named_trainable.items()}


def whole_a(assembled: Assembled) -> dict[str, Tensor]:
    """Returns a copy of every whole A, by the name of its layer.

    Ranks: all (collective).
    """
    named = named_trained(assembled)
    return {
        name.removesuffix(".lora_A"): gather_whole(parameter).clone()
        for name, parameter in named.items()
        if name.endswith(".lora_A")
    }


PLAIN = StepMode()
"""A step without anything special."""


def do_step(
    assembled: Assembled,
    optimizer: torch.optim.Optimizer,
    step: Step,
    mode: StepMode = PLAIN,
) -> None:
    """Forward, backward, clipping to 1 and the optimizer's step.

    Ranks: all (collective).
    """
    train_step(
        assembled.model,
        step,
        optimizer=optimizer,
        parameters=assembled.trainable,
        max_grad_norm=1.0,
        device=CPU,
        mode=mode,
    )


def train(
    assembled: Assembled,
    batches: Sequence[Sequence[Row]],
    *,
    micro_batch_size: int,
    lr: float,
    max_norm: float | None,
    scaler: LossScaler | None = None,
    no_sync: bool = False,
) -> tuple[list[float], list[float]]:
    """Trains; returns the loss over all ranks and the gradient norm of each step.

    Ranks: all (collective).
    """
    optimizer = torch.optim.AdamW(assembled.trainable, lr=lr, weight_decay=0.0, fused=True)
    losses: list[float] = []
    norms: list[float] = []
    for batch in batches:
        result = train_step(
            assembled.model,
            build_step(
                batch,
                micro_batch_size=micro_batch_size,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
            ),
            optimizer=optimizer,
            parameters=assembled.trainable,
            max_grad_norm=max_norm,
            device=CPU,
            mode=StepMode(scaler, no_sync),
        )
        loss = result.loss.clone()
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(result.grad_norm.item())
    return losses, norms
