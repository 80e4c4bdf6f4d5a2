"""What operators of torch take inside themselves while they run: a fake tensor does not show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Workspace = Callable[[Sequence[Any]], int]


def _exponents(args: Sequence[Any]) -> int:
    """``(self - maxes).exp_()`` of ``logsumexp`` (torch 2.13, aten/.../ReduceOps.cpp)."""
    x: Tensor = args[0]
    return x.nbytes


WORKSPACES: dict[Any, Workspace] = {torch.ops.aten.logsumexp.default: _exponents}
"""Operators -> bytes beside their inputs and outputs, from their positional arguments."""
