"""Trained weights of the base itself: masters in a precision of their own."""

from __future__ import annotations

import torch
from torch import nn


def make_trainable(parameter: nn.Parameter, *, master_dtype: torch.dtype) -> None:
    """Makes a parameter of a meta model trainable, and a master in ``master_dtype``, in place.

    The Parameter stays the same object, so tied weights stay tied.
    """
    parameter.data = parameter.data.to(master_dtype)
    parameter.requires_grad_(True)
