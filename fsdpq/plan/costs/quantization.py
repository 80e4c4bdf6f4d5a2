"""Names and shapes of the byte tensors that a quantized matrix becomes.

The quantizers of the worker half make their tensors with these functions. What the bytes mean is
said there: `fsdpq.quantization.bnb`, `fsdpq.quantization.hqq`.
"""

from __future__ import annotations

from fsdpq.errors import CheckpointError
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions

NESTED_BLOCK_SIZE = 256
"""Scales that share one second-level scale; fixed inside bitsandbytes' ``quantize_4bit``."""

CODES = "codes"
"""Name of the tensor of the quantized weights; all others are scales of some sort."""

PackedShapes = dict[str, tuple[int, int]]


def packed_shapes(
    options: BnbOptions | HqqOptions | NoQuantOptions, out_features: int, in_features: int
) -> PackedShapes:
    """Returns names and shapes of the byte tensors of one matrix; none where it stays as it is.

    Raises:
        CheckpointError: the options do not fit the matrix.
    """
    match options:
        case BnbOptions():
            return bnb_shapes(options, out_features, in_features)
        case HqqOptions():
            return hqq_shapes(options, out_features, in_features)
        case NoQuantOptions():
            return {}


def bnb_shapes(options: BnbOptions, out_features: int, in_features: int) -> PackedShapes:
    """Returns the byte tensors of a matrix that bitsandbytes quantizes in 4 bits."""
    num_weights = out_features * in_features
    num_blocks = -(-num_weights // options.block_size)
    scale_bytes = 1 if options.double_quant else 4
    if is_row_local(options, in_features):
        codes = (out_features, in_features // 2)
        absmax = (out_features, num_blocks // out_features * scale_bytes)
    else:
        codes = (-(-num_weights // 2), 1)
        absmax = (num_blocks, scale_bytes)
    shapes = {CODES: codes, "absmax": absmax}
    if options.double_quant:
        num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
        shapes |= {"nested_absmax": (num_nested, 4), "nested_offset": (1, 4)}
    return shapes


def is_row_local(options: BnbOptions | HqqOptions, in_features: int) -> bool:
    """Whether a row of the matrix quantizes by itself; else blocks of scales cross rows."""
    return isinstance(options, HqqOptions) or in_features % options.block_size == 0


def hqq_shapes(options: HqqOptions, out_features: int, in_features: int) -> PackedShapes:
    """Returns the byte tensors of a matrix that hqq quantizes.

    Raises:
        CheckpointError: the group size does not divide the side of the matrix that groups run
            along: a shard could not be dequantized by itself.
    """
    _check_groups(options, out_features, in_features)
    fold, group_size = stored_fold(options), options.group_size
    stored_rows = out_features // fold
    groups = in_features if options.axis == 0 else in_features // (group_size or in_features)
    scales = (stored_rows, groups * 2)
    row_bytes = fold * packed_row_bytes(in_features, options.nbits)
    return {CODES: (stored_rows, row_bytes), "scale": scales, "zero": scales}


def stored_fold(options: HqqOptions) -> int:
    """Returns how many rows of the matrix lie in one stored row."""
    return options.group_size or 1 if options.axis == 0 else 1


def packed_row_bytes(in_features: int, nbits: int) -> int:
    """Returns the bytes of one row that hqq packs, padded at its end to whole bytes."""
    if nbits == 3:
        return packed_row_bytes(in_features, 2) + packed_row_bytes(in_features, 1)
    return -(-in_features * nbits // 8)


def _check_groups(options: HqqOptions, out_features: int, in_features: int) -> None:
    axis, group_size = options.axis, options.group_size
    side, word = (in_features, "input") if axis == 1 else (out_features, "output")
    if group_size is None and axis == 0:
        raise CheckpointError(
            "`quantization.axis: 0` needs a `quantization.group_size`: a group of a whole "
            f"column of a {out_features} x {in_features} weight cannot be cut over ranks",
            hint="use `quantization.group_size: 64`, or `quantization.axis: 1`",
        )
    if group_size is None or side % group_size == 0:
        return
    fitting = [str(size) for size in (16, 32, 64, 128, 256) if side % size == 0]
    fitting += ["null"] if axis == 1 else []
    sizes = f"use {' or '.join(fitting)}, " if fitting else ""
    raise CheckpointError(
        f"`quantization.group_size: {group_size}` does not divide the {side} {word} "
        f"features of a {out_features} x {in_features} weight",
        hint=f"{sizes or 'use `quantization.axis: 1`, '}or name the layer in "
        "`quantization.modules_to_not_convert`",
    )
