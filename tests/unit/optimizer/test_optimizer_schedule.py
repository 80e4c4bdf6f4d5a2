"""Schedules follow transformers after the warmup, and torch's LinearLR during it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from fsdpq.optimizer.build import (
    Schedule,
    build_constant_schedule,
    build_cosine_schedule,
    build_linear_schedule,
    build_wsd_schedule,
)
from fsdpq.recipe.sections.lr_scheduler import (
    ConstantScheduleOptions,
    CosineScheduleOptions,
    LinearScheduleOptions,
    WsdScheduleOptions,
)

WARMUP, TOTAL = 4, 20


def _factors(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in range(TOTAL)]


def _reference(build: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)  # pyright: ignore[reportCallIssue]
    factors = []
    for _ in range(TOTAL):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_equals_transformers(kind: str) -> None:
    if kind == "linear":
        options = LinearScheduleOptions(kind="linear", warmup_steps=WARMUP)
        ours = _factors(build_linear_schedule(options, total_steps=TOTAL))
        theirs = _reference(lambda o: get_linear_schedule_with_warmup(o, WARMUP, TOTAL))
    else:
        options = CosineScheduleOptions(kind="cosine", warmup_steps=WARMUP)
        ours = _factors(build_cosine_schedule(options, total_steps=TOTAL))
        theirs = _reference(lambda o: get_cosine_schedule_with_warmup(o, WARMUP, TOTAL))
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=1e-12)
    assert all(factor > 0 for factor in ours)


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(
    ("given", "num_decay"), [({"decay_steps": 7}, 7), ({"decay_ratio": 0.31}, 7), ({}, 2)]
)
def test_wsd_equals_transformers(
    decay_type: Literal["linear", "cosine", "1-sqrt"], given: dict[str, Any], num_decay: int
) -> None:
    options = WsdScheduleOptions(
        kind="wsd", warmup_steps=WARMUP, decay_type=decay_type, min_lr_ratio=0.1, **given
    )
    ours = _factors(build_wsd_schedule(options, total_steps=TOTAL))
    theirs = _reference(
        lambda o: get_wsd_schedule(
            o, WARMUP, num_decay, num_training_steps=TOTAL, decay_type=decay_type, min_lr_ratio=0.1
        )
    )
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=1e-12)
    assert ours.count(1.0) == TOTAL - WARMUP - num_decay + 1, "the decay starts at the peak"
    assert all(factor > 0 for factor in ours)


def test_warmup_equals_torch_and_wastes_no_step() -> None:
    options = ConstantScheduleOptions(kind="constant", warmup_steps=WARMUP)
    ours = _factors(build_constant_schedule(options, total_steps=TOTAL))
    start = 1.0 / (WARMUP + 1)
    theirs = _reference(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=start, total_iters=WARMUP)
    )
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_floor_is_a_share_of_the_peak() -> None:
    options = CosineScheduleOptions(kind="cosine", min_lr_ratio=0.1)
    schedule = build_cosine_schedule(options, total_steps=TOTAL)
    assert schedule(TOTAL) == pytest.approx(0.1)
    assert schedule(0) == pytest.approx(1.0)
