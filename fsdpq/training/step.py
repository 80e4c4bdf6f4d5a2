"""One optimizer step, and the held-out loss.

The loss of a step is the sum of its token losses over the number of tokens that carry loss, over
all ranks and micro-batches: gradients do not depend on how a batch was split. Nothing here waits
for the device; numbers stay tensors until the loop reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdpq.data.loader import Step


@dataclass(frozen=True)
class StepResult:
    """What one step gives, still on the device.

    Attributes:
        loss: this rank's share of the mean token loss; the sum over ranks is the loss. Scalar.
        grad_norm: global norm of the gradients before clipping. Scalar.
    """

    loss: Tensor
    grad_norm: Tensor


def train_step(
    model: nn.Module,
    step: Step,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float | None,
    device: torch.device,
) -> StepResult:
    """Runs forward and backward over the rank's micro-batches and updates the weights.

    Ranks: all (collective).
    """
    loss = torch.zeros((), device=device)
    for micro_batch in step.micro_batches:
        batch = micro_batch.to(device)
        token_losses = model(
            batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids
        )
        share = token_losses / step.num_trained
        share.backward()
        loss += share.detach()
    grad_norm = clip_gradients(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales gradients in place to at most ``max_norm``; returns their norm before, a scalar.

    Ranks: all (collective).
    """
    norm = torch.nn.utils.clip_grad_norm_(
        parameters, float("inf") if max_norm is None else max_norm, foreach=True
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def evaluate(model: nn.Module, steps: Iterable[Step], *, device: torch.device) -> float:
    """Returns the mean token loss over held-out rows, in nats.

    Ranks: all (collective).
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_trained = 0
    for step in steps:
        num_trained += step.num_trained
        for micro_batch in step.micro_batches:
            batch = micro_batch.to(device)
            total += model(batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids)
    if dist.is_initialized():
        dist.all_reduce(total)
    model.train(was_training)
    return total.item() / num_trained
