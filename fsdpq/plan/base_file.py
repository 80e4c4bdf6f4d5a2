"""The quantized base that a run keeps in the cache: whether it makes one, and how large it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from fsdpq.plan.costs.parameters import (
    FP32_BYTES,
    Choice,
    HeldGroup,
    HeldParameter,
)
from fsdpq.plan.shape import ModelShape
from fsdpq.recipe.precision import Dtype, precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions
from fsdpq.tensor_files.base_layout import StoredTensor, lay_out
from fsdpq.tensor_files.base_manifest import CHUNK_BYTES

MIN_BASE_BYTES = 256 * 10**6
"""A smaller base is quantized in less time than the ranks take to start once more."""

CHECKSUM_BYTES = 4
"""For each `fsdpq.tensor_files.base_manifest.CHUNK_BYTES` of the weights."""

STORED_DTYPES: dict[Dtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Names of dtypes in recipes, and in safetensors files."""

_FROZEN = LoraOptions.model_construct(kind="lora", target_modules=(), modules_to_save=())
"""A base holds every layer of the checkpoint, frozen."""


def keeps_base(recipe: Recipe, num_bytes: int, *, is_stored: bool) -> bool:
    """Whether a run keeps a quantized base of its model in the cache.

    Args:
        recipe: resolved.
        num_bytes: that it will have.
        is_stored: the checkpoint is quantized already.
    """
    options = recipe.quantization
    if isinstance(options, NoQuantOptions) or not options.cache:
        return False
    return num_bytes >= MIN_BASE_BYTES and not is_stored


def base_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Returns the bytes of a quantized base: of its weights' file and of its checksums.

    Exact where the order of the tensors is the model's: elsewhere wrong by less than the padding
    at the end of the file.

    Raises:
        CheckpointError: the quantization does not fit a matrix of the model.
    """
    num_bytes = weights_bytes(recipe, shape)
    return num_bytes + CHECKSUM_BYTES * -(-num_bytes // CHUNK_BYTES)


def weights_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Returns the bytes of a base's ``base.safetensors``.

    Raises:
        CheckpointError: the quantization does not fit a matrix of the model.
    """
    options: Any = recipe.quantization  # frozen, so it can be hashed
    return _weights_bytes(options, precision_of(recipe).base, shape)


@functools.lru_cache(maxsize=64)
def _weights_bytes(
    quantization: BnbOptions | HqqOptions | NoQuantOptions, dtype: Dtype, shape: ModelShape
) -> int:
    choice = Choice(quantization, _FROZEN, shape, dtype, dtype)
    packed: dict[str, StoredTensor] = {}
    plain: dict[str, StoredTensor] = {}
    for prefix, held in _groups(choice):
        for each in held.parameters:
            kind = packed if each.is_bytes else plain
            kind[prefix + each.name] = StoredTensor(_stored_dtype(each, dtype), each.shape)
    return lay_out(packed | plain).num_bytes  # `fsdpq.model.loading.targets` has this order


def _stored_dtype(parameter: HeldParameter, dtype: Dtype) -> str:
    if parameter.is_bytes:
        return "U8"
    return "F32" if parameter.item_bytes == FP32_BYTES else STORED_DTYPES[dtype]


def _groups(choice: Choice) -> Iterator[tuple[str, HeldGroup]]:
    """Yields every group in the order of the model, and what stands before its names."""
    shape = choice.shape
    outside = {group.name: group for group in shape.groups if group.name != "layer"}
    yield "", choice.held(outside["embedding"])
    numbered = [(index, group) for group in shape.layers for index in shape.layer_indices(group)]
    same: dict[int, HeldGroup] = {}
    for index, group in sorted(numbered, key=lambda each: each[0]):
        if id(group) not in same or choice.names_single_layers:
            same[id(group)] = choice.held(group, index)
        yield f"{shape.layers_prefix}{index}.", same[id(group)]
    for name in ("root", "head"):
        if name in outside:
            yield "", choice.held(outside[name])
