"""Which trained weights share a learning rate, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def lora_plus_groups(
    parameters: Mapping[str, nn.Parameter], *, lr: float, ratio: float
) -> list[dict[str, Any]]:
    """Returns parameter groups of a torch optimizer; one group where ``ratio`` is 1.

    LoRA+ (https://arxiv.org/abs/2402.12354): matrices B learn ``ratio`` times as fast as all else.
    Vectors (magnitudes of DoRA, biases, norms) go with B, as in PEFT's
    ``create_loraplus_optimizer``.

    Args:
        parameters: trained weights by their names in the model.
        lr: of all but B.
        ratio: learning rate of B over ``lr``.
    """
    if ratio == 1.0:
        return [{"params": list(parameters.values()), "lr": lr}]
    fast = {name for name, p in parameters.items() if p.ndim == 1 or name.endswith(".lora_B")}
    slow = [parameter for name, parameter in parameters.items() if name not in fast]
    groups = [
        {"params": slow, "lr": lr},
        {"params": [parameters[name] for name in parameters if name in fast], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]
