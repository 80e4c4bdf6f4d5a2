"""One optimizer step, and the held-out loss.

The loss of a step is the sum of its token losses over the number of tokens that carry loss, over
all ranks and micro-batches: gradients do not depend on how a batch was split. Nothing here waits
for the device; numbers stay tensors until the loop reads them.

A mixture's load-balancing loss is no sum over tokens. That of a step is the mean over its
micro-batches, weighted by their tokens without padding: it does not depend on which rank computes a
micro-batch, but on which rows share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fsdpq.data.dealing.collate import MicroBatch, Step
from fsdpq.dist import own_shard, placement
from fsdpq.protocols import Losses
from fsdpq.training.scaler import LossScaler


@dataclass(frozen=True)
class StepResult:
    """What one step gives, still on the device.

    Attributes:
        loss: this rank's share of the mean token loss; the sum over ranks is the loss. Scalar.
        grad_norm: global norm of the gradients before clipping. Scalar.
        skipped: the scaled gradients overflowed, and the weights stayed.
        aux_loss: this rank's share of the load-balancing loss, without its coefficient. Scalar,
            None where it is not computed.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: bool = False
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class StepMode:
    """How a step is done, beyond the plain way.

    Attributes:
        scaler: scales the loss for fp16, None elsewhere.
        no_sync: reduce gradients once, after the last micro-batch, and add them up unsharded.
        on_phase: told ``forward``, ``backward`` and ``optimizer`` as each ends.
        router_aux_loss_coef: factor on the load-balancing loss; 0 does not compute it.
    """

    scaler: LossScaler | None = None
    no_sync: bool = False
    on_phase: Callable[[str], Any] = lambda _phase: None
    router_aux_loss_coef: float = 0.0


def train_step(
    model: nn.Module,
    step: Step,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float | None,
    device: torch.device,
    mode: StepMode = StepMode(),
) -> StepResult:
    """Runs forward and backward over the rank's micro-batches and updates the weights.

    Ranks: all (collective).

    Args:
        model: returns the sum of a micro-batch's token losses; its ``losses`` that and the
            load-balancing loss.
        step: this rank's part of the step.
        optimizer: over ``parameters``.
        parameters: the trained ones.
        max_grad_norm: gradients are scaled down to it; None leaves them.
        device: this rank's device.
        mode: loss scaling, accumulation, and who is told of phases.
    """
    scaler = mode.scaler
    scale = 1.0 if scaler is None else scaler.scale
    coefficient = mode.router_aux_loss_coef
    loss, aux_loss = torch.zeros(2, device=device).unbind()
    last = len(step.micro_batches) - 1
    for index, micro_batch in enumerate(step.micro_batches):
        if mode.no_sync:
            reduce_after_backward(model, index == last)
        batch = micro_batch.to(device)
        losses = loss_shares(model, batch, step, with_router=coefficient > 0)
        mode.on_phase("forward")
        ((losses.tokens + coefficient * losses.router) * scale).backward()
        mode.on_phase("backward")
        loss += losses.tokens.detach()
        aux_loss += losses.router.detach()
    grad_norm = clip_gradients(parameters, max_grad_norm, loss_scale=scale)
    skipped = scaler is not None and not scaler.take(grad_norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mode.on_phase("optimizer")
    return StepResult(loss, grad_norm, skipped, aux_loss if coefficient else None)


def loss_shares(model: nn.Module, batch: MicroBatch, step: Step, *, with_router: bool) -> Losses:
    """Returns what a micro-batch adds to the losses of its step; the router's is 0 without it."""
    inputs = (batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids)
    if not (with_router and batch.num_tokens):  # an empty micro-batch has no routed tokens
        tokens = model(*inputs)
        return Losses(tokens / step.num_trained, torch.zeros_like(tokens))
    compute = cast("Callable[..., Losses]", model.losses)
    losses = compute(*inputs, batch.is_token)
    weight = batch.num_tokens / step.num_tokens
    return Losses(losses.tokens / step.num_trained, losses.router * weight)


def reduce_after_backward(model: nn.Module, reduce: bool) -> None:
    """Says whether the next backward reduces gradients or only adds them up, unsharded."""
    root = cast("FSDPModule", model)
    root.set_requires_gradient_sync(reduce)
    root.set_is_last_backward(reduce)


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float | None, *, loss_scale: float = 1.0
) -> Tensor:
    """Unscales gradients and scales them down to at most ``max_norm``, in place.

    As ``torch.nn.utils.clip_grad_norm_``, but the norm of bf16 gradients is computed in fp32.

    Ranks: all (collective).

    Returns:
        The norm of the unscaled gradients before clipping, fp32, a scalar.
    """
    gradients = [own_shard(p.grad).rows for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    squares = torch.stack(norms).square().sum()
    group = placement(parameters[0]).group
    if group is not None:
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt() / loss_scale
    if max_norm is None and loss_scale == 1.0:
        return norm
    limit = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.as_tensor(limit / loss_scale, device=norm.device)
    if factor.device.type == "cpu" and factor.item() == 1.0:
        # Reading a number waits for nothing on the host, and a pass over all gradients costs a
        # fifth of the step there.
        return norm
    torch._foreach_mul_(gradients, factor)
    return norm


@torch.no_grad()
def evaluate(model: nn.Module, steps: Iterable[Step], *, device: torch.device) -> float:
    """Returns the mean token loss over held-out rows, in nats; 0 over none.

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
    return total.item() / max(1, num_trained)
