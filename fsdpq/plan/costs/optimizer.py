"""Bytes of an optimizer's states."""

from __future__ import annotations

import math

from fsdpq.recipe.sections.optimizer import (
    AdadeltaOptions,
    AdamW8bitOptions,
    AdamWOptions,
    MuonOptions,
    OptimizerOptions,
    SgdOptions,
)

BLOCK_SIZE = 256
"""Running means in 8 bits that share a scale; fixed inside bitsandbytes."""

MIN_8BIT_SIZE = 4096
"""Smaller tensors keep fp32 means, as in bitsandbytes; counted over all ranks."""

STEP_BYTES = 4
"""Torch's optimizers count the steps of every tensor in one fp32 number."""


def state_bytes(
    options: OptimizerOptions,
    shape: tuple[int, ...],
    *,
    num_rows: int,
    item_bytes: int,
    in_layers: bool,
) -> int:
    """Returns the bytes of the states of one trained tensor.

    Args:
        options: of the recipe.
        shape: of the whole tensor.
        num_rows: of it that are held.
        item_bytes: of one of its weights.
        in_layers: it is inside the decoder layers.
    """
    num_weights = num_rows * math.prod(shape[1:])
    match options:
        case AdamW8bitOptions():
            return _bytes_of_8bit(math.prod(shape), num_weights)
        case MuonOptions():
            is_hidden = in_layers and len(shape) == 2
            return num_weights * item_bytes * (1 if is_hidden else 2) + STEP_BYTES * (not is_hidden)
        case SgdOptions():
            return num_weights * item_bytes if options.momentum else 0
        case AdamWOptions() | AdadeltaOptions():  # Adam is an AdamW here
            return 2 * num_weights * item_bytes + STEP_BYTES


def num_states(options: OptimizerOptions) -> int:
    """Returns how many tensors an optimizer keeps for most trained ones."""
    match options:
        case AdamW8bitOptions():
            return 4
        case MuonOptions():
            return 1
        case SgdOptions():
            return 1 if options.momentum else 0
        case AdamWOptions() | AdadeltaOptions():
            return 2


def _bytes_of_8bit(of_whole: int, num_weights: int) -> int:
    if of_whole < MIN_8BIT_SIZE:
        return 2 * 4 * num_weights
    return 2 * (num_weights + 4 * -(-num_weights // BLOCK_SIZE))
