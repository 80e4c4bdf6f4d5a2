"""Disk space of a run: what it downloads, keeps in the cache, saves and leaves behind."""

from __future__ import annotations

from fsdpq.plan.base_file import base_bytes, keeps_base
from fsdpq.plan.costs.optimizer import num_states
from fsdpq.plan.costs.parameters import DTYPE_BYTES
from fsdpq.plan.result import DiskUse
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.sharding import sharding_of
from fsdpq.plan.weights import Weights
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions
from fsdpq.recipe.sections.training import CheckpointOptions

CHECKPOINT_DTYPE_BYTES = 2
"""Published checkpoints hold 16 bits a weight; where their files were seen, those count."""

PART_BYTES = 190
"""What a checkpoint says of each rank's part of a tensor: in its file's header and in the index."""

TENSOR_BYTES = 170
"""What it says of each whole tensor, in ``index.json`` and ``state.json``."""

RANK_BYTES = 13_400
"""Of each rank: its generators, and names of what is no trained tensor."""

FACTS_BYTES = 3_300
"""The recipe, the manifest, the place in the data. These four measured on checkpoints of tiny
models: six methods and optimizers on 1, 2 and 4 ranks, all within 5%."""

_REQUANTIZED: dict[str, BnbOptions | HqqOptions] = {
    "nf4": BnbOptions.model_construct(kind="bnb"),
    "hqq": HqqOptions.model_construct(kind="hqq"),
}
"""``export.merge_requantize`` -> how, where the run's own base is quantized in another way."""


def plan_disk(recipe: Recipe, shape: ModelShape, weights: Weights) -> DiskUse:
    """Returns the disk space of the machine that has the most.

    Data is not in it, prepared rows neither: a recipe does not say how many rows there are.

    Args:
        recipe: resolved.
        shape: of its model.
        weights: what its FSDP groups store.

    Raises:
        CheckpointError: the quantization does not fit a matrix of the model.
    """
    return DiskUse(
        download_bytes=0 if shape.is_here else download_bytes(shape),
        cache_bytes=cached_base_bytes(recipe, shape),
        checkpoint_bytes=num_checkpoints(recipe.checkpoint) * checkpoint_bytes(recipe, weights),
        export_bytes=export_bytes(recipe, shape, weights),
    )


def download_bytes(shape: ModelShape) -> int:
    """Returns the bytes of a model's files."""
    if shape.checkpoint_bytes is not None:
        return shape.checkpoint_bytes
    return shape.num_weights * CHECKPOINT_DTYPE_BYTES


def cached_base_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Returns the bytes of the quantized base that a run keeps in the cache, 0 for none.

    Raises:
        CheckpointError: the quantization does not fit a matrix of the model.
    """
    if shape.stored_as == "base":
        return 0
    num_bytes = base_bytes(recipe, shape)
    is_needed = recipe.fsdp.offload == "disk"
    kept = keeps_base(recipe, num_bytes, is_stored=shape.stored_as != "plain")
    return num_bytes if is_needed or kept else 0


def num_checkpoints(options: CheckpointOptions) -> int:
    """Returns how many checkpoints are on the disk at once, one that is being written included.

    A run that saves none by itself still saves one where it is told to stop.
    """
    if options.interval is None and options.interval_minutes is None and not options.keep_best:
        return 1
    return options.keep_last + options.keep_best + 1


def checkpoint_bytes(recipe: Recipe, weights: Weights) -> int:
    """Returns about the bytes of one checkpoint; its tensors are exact.

    It holds what is trained and the optimizer's states, both whole, and the first values of an
    adapter that took them from the base.
    """
    whole, keeps_first = weights.whole, _keeps_first_values(recipe)
    tensors = whole.trained * (1 + keeps_first) + whole.optimizer
    num_tensors = whole.num_trained_tensors * (1 + num_states(recipe.optimizer) + keeps_first)
    of_rank = RANK_BYTES * sharding_of(recipe).num_ranks + FACTS_BYTES
    return tensors + num_tensors * (TENSOR_BYTES + PART_BYTES * weights.num_shards) + of_rank


def export_bytes(recipe: Recipe, shape: ModelShape, weights: Weights) -> int:
    """Returns the bytes of what a run leaves behind: an adapter or a model, and the merged one."""
    whole, item_bytes = weights.whole, DTYPE_BYTES[precision_of(recipe).base]
    match recipe.export.format:
        case "peft":
            # With its first values: the base that others have is the unchanged one.
            exported = whole.trained * (1 + _keeps_first_values(recipe)) + _tied_again(weights)
        case "delta":
            exported = whole.num_trained * item_bytes
        case _:
            exported = _num_weights(shape, weights) * item_bytes
    return exported + (_merged_bytes(recipe, shape, weights) if recipe.export.merge else 0)


def _keeps_first_values(recipe: Recipe) -> bool:
    """Whether the adapter took its first values from the base, and keeps them."""
    adapter = recipe.adapter
    return isinstance(adapter, LoraOptions) and adapter.init in ("pissa", "olora")


def _tied_again(weights: Weights) -> int:
    """Returns the bytes of a trained table that PEFT's format holds under both of its names."""
    has_head = any(group.name == "head" for group in weights.groups)
    tables = [group.whole.trained for group in weights.groups if group.name == "embedding"]
    return 0 if has_head else sum(tables)


def _num_weights(shape: ModelShape, weights: Weights) -> int:
    """Returns the weights of the model as it is trained, new layers included."""
    return sum(shape.groups[group.index].num_weights * group.count for group in weights.groups)


def _merged_bytes(recipe: Recipe, shape: ModelShape, weights: Weights) -> int:
    """Returns the bytes of the base with what was trained merged into it."""
    options = recipe.export
    if options.merge_requantize is not None:
        kind = _REQUANTIZED[options.merge_requantize]
        given = recipe.quantization
        same = given if given.kind == kind.kind else kind
        return base_bytes(recipe.model_copy(update={"quantization": same}), shape)
    dtype = options.merge_dtype or precision_of(recipe).base
    return _num_weights(shape, weights) * DTYPE_BYTES[dtype]
