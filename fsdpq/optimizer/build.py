"""Builds the optimizer over the trainable shards, and the learning-rate schedule.

A schedule is a factor on the peak learning rate as a function of the step, so that it can be drawn,
tested and resumed by the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from fsdpq.optimizer.groups import lora_plus_groups
from fsdpq.recipe.sections.lr_scheduler import (
    ConstantScheduleOptions,
    CosineScheduleOptions,
    LinearScheduleOptions,
    WsdScheduleOptions,
)
from fsdpq.recipe.sections.optimizer import AdadeltaOptions, AdamOptions, AdamWOptions, SgdOptions

Schedule = Callable[[int], float]
"""Maps the 0-based step to the factor on the peak learning rate."""


def build_adamw(
    options: AdamWOptions, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns torch's fused AdamW over ``parameters``; states live on the shards' devices."""
    return torch.optim.AdamW(
        lora_plus_groups(parameters, lr=options.lr, ratio=options.lora_plus_ratio),
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def build_adam(
    options: AdamOptions, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns torch's fused Adam over ``parameters``."""
    return torch.optim.Adam(
        lora_plus_groups(parameters, lr=options.lr, ratio=options.lora_plus_ratio),
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def build_sgd(options: SgdOptions, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Returns torch's SGD over ``parameters``; its fused one knows no DTensors (torch 2.13)."""
    return torch.optim.SGD(
        lora_plus_groups(parameters, lr=options.lr, ratio=options.lora_plus_ratio),
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        foreach=True,
    )


def build_adadelta(
    options: AdadeltaOptions, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns torch's Adadelta over ``parameters``; torch has no fused one.

    Lists of tensors save starts of kernels on a GPU. On the host they are the slower way.
    """
    return torch.optim.Adadelta(
        list(parameters.values()),
        lr=options.lr,
        rho=options.rho,
        eps=options.eps,
        weight_decay=options.weight_decay,
        foreach=any(parameter.device.type != "cpu" for parameter in parameters.values()),
    )


def build_constant_schedule(options: ConstantScheduleOptions, *, total_steps: int) -> Schedule:
    """Returns warmup, then 1."""
    return _with_warmup(options, total_steps, lambda _: 1.0)


def build_linear_schedule(options: LinearScheduleOptions, *, total_steps: int) -> Schedule:
    """Returns warmup, then a straight line from 1 to ``min_lr_ratio``."""
    span = 1.0 - options.min_lr_ratio
    return _with_warmup(options, total_steps, lambda progress: 1.0 - span * progress)


def build_cosine_schedule(options: CosineScheduleOptions, *, total_steps: int) -> Schedule:
    """Returns warmup, then half a cosine from 1 to ``min_lr_ratio``."""
    span = 1.0 - options.min_lr_ratio
    return _with_warmup(
        options,
        total_steps,
        lambda progress: options.min_lr_ratio + span * (1.0 + math.cos(math.pi * progress)) / 2.0,
    )


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Values of ``lr_scheduler.decay_type`` -> factor by progress, from 1 to 0."""


def build_wsd_schedule(options: WsdScheduleOptions, *, total_steps: int) -> Schedule:
    """Returns warmup, then 1, then a decay to ``min_lr_ratio`` over the last steps.

    As transformers' ``get_wsd_schedule`` after the warmup.
    """
    start = total_steps - options.num_decay_steps(total_steps)
    plain = _with_warmup(options, total_steps, lambda _: 1.0)
    floor, shape = options.min_lr_ratio, DECAYS[options.decay_type]

    def factor(step: int) -> float:
        if step < start:
            return plain(step)
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return floor + (1.0 - floor) * shape(progress)

    return factor


def _with_warmup(
    options: ConstantScheduleOptions, total_steps: int, decay: Callable[[float], float]
) -> Schedule:
    """``decay`` sees its progress from 0 at the peak to 1 after the last step.

    As transformers' ``get_*_schedule_with_warmup``, but no step is wasted on a learning rate of 0.
    """
    warmup = options.num_warmup_steps(total_steps)
    decay_steps = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / decay_steps))

    return factor
