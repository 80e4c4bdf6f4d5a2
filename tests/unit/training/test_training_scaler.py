"""Loss scaling and clipping against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import random_rows
from torch import Tensor, nn

from fsdpq.data.dealing.collate import build_step
from fsdpq.errors import TrainingError
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import StepMode, clip_gradients, train_step

OVERFLOWS = (0, 1, 5)
"""Steps whose gradients are made infinite."""


class Table(nn.Module):
    """A language model of one table, whose loss can be made to overflow in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(331, 331)
        self.overflow = False

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        assert position_ids is None
        logits = self.table(input_ids).flatten(0, 1)[positions]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        if self.overflow:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss


def test_scaling_equals_torchs_grad_scaler() -> None:
    step = build_step(random_rows(4), micro_batch_size=2, rank=0, world_size=1)
    ours, theirs = Table(), Table()
    scaler = LossScaler(scale=2.0**10, growth_interval=2)
    reference = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for index in range(8):
        ours.overflow = theirs.overflow = index in OVERFLOWS
        result = train_step(
            ours,
            step,
            optimizer=our_optimizer,
            parameters=list(ours.parameters()),
            max_grad_norm=0.1,
            device=torch.device("cpu"),
            mode=StepMode(scaler),
        )
        for batch in step.micro_batches:
            loss = theirs(batch.input_ids, batch.loss_positions, batch.targets)
            reference.scale(loss / step.num_trained).backward()
        reference.unscale_(their_optimizer)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        reference.step(their_optimizer)
        reference.update()
        their_optimizer.zero_grad()
        assert result.skipped == (index in OVERFLOWS)
        assert scaler.scale == reference.get_scale()
        if not result.skipped:
            assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert torch.allclose(ours.table.weight, theirs.table.weight, rtol=0, atol=1e-6)
    assert scaler.num_skipped == len(OVERFLOWS)


def test_gradients_that_stay_infinite_end_the_run() -> None:
    scaler = LossScaler(scale=2.0)
    assert not scaler.take(torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="even with the loss unscaled"):
        scaler.take(torch.tensor(math.nan))


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_equals_torchs(max_norm: float | None) -> None:
    torch.manual_seed(1)
    ours = [nn.Parameter(torch.randn(size)) for size in (5, 7, 1)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-6)  # pyright: ignore[reportArgumentType]


def test_gradients_on_the_host_are_written_only_where_that_changes_them() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    clip_gradients([parameter], 2.0)
    assert parameter.grad._version == 0
    clip_gradients([parameter], 1.0)
    assert parameter.grad._version == 1
    clip_gradients([parameter], 2.0, loss_scale=2.0)
    assert parameter.grad._version == 2


def test_the_norm_of_bf16_gradients_is_computed_in_fp32() -> None:
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 1.0 + 2.0**-7)
    # 64.5 is no multiple of bf16's spacing there, 0.5, times an odd number more: fp32 is exact.
    assert clip_gradients([parameter], None).item() == 64.0 * (1.0 + 2.0**-7)
