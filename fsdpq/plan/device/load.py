"""Working memory of loading: reading a matrix, quantizing it, starting the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fsdpq.plan.costs.parameters import DTYPE_BYTES
from fsdpq.plan.costs.quantization import is_row_local
from fsdpq.plan.hardware.machine import MIB
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.weights import Weights
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions, LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions

COPY_BYTES = 16 * MIB
"""Rows that are not quantized come in pieces of this size (`fsdpq.model.loading.source`)."""

BNB_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Weights that bitsandbytes quantizes at once (`fsdpq.quantization.bnb`)."""

BNB_CHUNKS = 16

BNB_WORK = {"cpu": 20, "cuda": 1}
"""Bytes of work for each of them."""

HQQ_BLOCK = 1 << 22
"""Weights that hqq quantizes at once (`fsdpq.quantization.hqq`)."""

HQQ_WORK = 30

NORM_CHUNK = 1 << 22
"""Weights whose squares exist at once where DoRA takes norms (`fsdpq.adapter.dora`)."""


def load_bytes(recipe: Recipe, shape: ModelShape, weights: Weights) -> int:
    """Returns what loading takes beside the shards, at the most."""
    options, device = recipe.quantization, str(recipe.launch.device)
    size = DTYPE_BYTES[precision_of(recipe).base]
    if isinstance(options, NoQuantOptions):
        return COPY_BYTES
    most = COPY_BYTES
    for rows, columns in _matrices(shape):
        elements = rows * columns
        own = -(-rows // weights.num_shards) * columns
        match options:
            case BnbOptions():
                scales = 3 * 4 * (elements // options.block_size) if options.double_quant else 0
                chunk = min(BNB_CHUNK[device], max(columns, own // BNB_CHUNKS))
                if not is_row_local(options, columns):
                    chunk = elements
                most = max(most, scales + chunk * (size + BNB_WORK[device]))
            case HqqOptions():
                most = max(most, min(HQQ_BLOCK, elements) * HQQ_WORK)
    return most


def init_bytes(recipe: Recipe, shape: ModelShape, weights: Weights) -> int:
    """Returns what starting the adapter takes beside the shards, at the most."""
    adapter = recipe.adapter
    if not isinstance(adapter, LoraOptions):
        return 0
    size = DTYPE_BYTES[precision_of(recipe).base]
    largest = max((rows * columns for rows, columns in _matrices(shape)), default=0)
    if adapter.init in ("pissa", "olora"):
        return 4 * largest * 4
    if not isinstance(adapter, DoraOptions):
        return 0
    whole = max((group.whole.frozen for group in weights.layers), default=0)
    packed = whole * largest // max(1, _layer_weights(shape)) if weights.num_shards > 1 else 0
    return packed + largest * size + min(NORM_CHUNK, largest) * 4


def _matrices(shape: ModelShape) -> Iterator[tuple[int, int]]:
    """Yields rows and columns of every matrix of the decoder layers, experts as one."""
    for group in shape.layers:
        for tensor in group.tensors:
            if tensor.kind in ("linear", "experts"):
                *rows, columns = tensor.shape
                yield math.prod(rows), columns


def _layer_weights(shape: ModelShape) -> int:
    return max((group.num_weights for group in shape.layers), default=0)
