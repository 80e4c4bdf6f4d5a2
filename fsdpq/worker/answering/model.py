"""A model that one process answers with: whole, with what was trained, and without it.

Parameters are plain ones where the device holds them, so that nothing is copied for a token; a base
on the host (``fsdp.offload``) under a GPU, or in a file, goes through FSDP as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from fsdpq.dist import own_shard
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.protocols import DTYPES
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.worker.assemble import Assembled, Inputs, assemble_model, without_gpu_kernels

SHARE_FOR_MATRICES = 0.5
"""Of the free memory, how much dequantized matrices may take (``--dequantize auto``)."""

SHARE_FOR_INITIAL = 0.25
"""Of the free memory, how much the initial values of what was trained may take."""


def answering_recipe(recipe: Recipe, device_type: str) -> Recipe:
    """Returns ``recipe`` without what only training needs, for a device of this machine."""
    if device_type == "cpu":
        recipe = without_gpu_kernels(recipe)
    fsdp: dict[str, Any] = {"activation_checkpointing": "none", "activation_offload": False}
    if device_type == "cpu" and recipe.fsdp.offload == "cpu":
        fsdp["offload"] = "none"  # the host's memory is the device's
    sections = {
        "fsdp": recipe.fsdp.model_copy(update=fsdp),
        "training": recipe.training.model_copy(update={"compile": False, "layer_chunks": 1}),
        "data": recipe.data.model_copy(update={"packing": "none"}),
    }
    return recipe.model_copy(update=sections)


def assemble_for_answers(
    recipe: Recipe,
    inputs: Inputs,
    *,
    device: torch.device,
    report_load: Callable[[int, int], Any],
) -> Assembled:
    """Builds and loads the model, what is trained at its initial values.

    Args:
        recipe: of `answering_recipe`.
        inputs: of the run.
        device: that computes.
        report_load: told done and total bytes.
    """
    return assemble_model(
        recipe,
        inputs.model_dir,
        device=device,
        report_load=report_load,
        base=inputs.base,
        trust_remote_code=inputs.trust_remote_code,
        sharded=recipe.fsdp.offload != "none",
    )


def cast_trained(assembled: Assembled, recipe: Recipe) -> None:
    """Casts what was trained to what forward casts it to for every token, in place.

    Weights of the base go to ``model.dtype``, as FSDP does to gather them; adapters to the dtype of
    products, but for what they keep in fp32. Sharded ones stay: FSDP casts them.
    """
    if recipe.fsdp.offload != "none":
        return
    precision = precision_of(recipe)
    for parameter in assembled.trained_base.values():
        parameter.data = parameter.data.to(DTYPES[precision.base])
    for layer in assembled.adapted_layers.values():
        for name in layer.peft_names:
            if name not in layer.fp32_names:
                parameter: nn.Parameter = getattr(layer, name)
                parameter.data = parameter.data.to(DTYPES[precision.compute])


def keep_matrices(assembled: Assembled, recipe: Recipe, how: str, device: torch.device) -> float:
    """Dequantizes matrices once, instead of for every token, in place.

    Args:
        assembled: with what was trained.
        recipe: of `answering_recipe`.
        how: ``always``, ``never``, or ``auto``: as many as half of the free memory holds.
        device: that computes.

    Returns:
        The share of the quantized weights that is kept so.
    """
    stacks = [each for each in assembled.model.modules() if isinstance(each, PackedMatrix)]
    if not stacks or how == "never" or recipe.fsdp.offload != "none":
        return 0.0
    dtype = DTYPES[precision_of(recipe).compute]
    room = SHARE_FOR_MATRICES * free_bytes(device)
    done = total = 0
    for stack in stacks:
        size = stack.in_features * stack.out_features * dtype.itemsize
        total += size
        if how == "always" or done + size <= room:
            done += stack.keep_matrix(dtype)
    return done / total


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class TrainedSwitch:
    """Puts what was trained in and out; made before it is loaded.

    Args:
        assembled: what is trained at its initial values.
        device: that computes.

    Attributes:
        is_in: whether the model has what was trained.
        is_usable: False where memory does not hold the initial values too.
    """

    def __init__(self, assembled: Assembled, device: torch.device) -> None:
        self._assembled = assembled
        self.is_in = True
        initial = {n: own_shard(p).rows for n, p in assembled.named_trainable.items()}
        size = sum(rows.nbytes for rows in initial.values())
        self.is_usable = size <= SHARE_FOR_INITIAL * free_bytes(device)
        self._other: dict[str, Tensor] = {}
        if self.is_usable:
            self._other = {name: rows.clone() for name, rows in initial.items()}

    def put(self, trained: bool) -> bool:
        """Makes the model answer with or without what was trained; returns whether it changed."""
        if trained == self.is_in:
            return False
        if not self.is_usable:
            raise RuntimeError("the initial values were not kept")
        for name, parameter in self._assembled.named_trainable.items():
            rows = own_shard(parameter).rows
            now = rows.clone()
            rows.copy_(self._other[name])
            self._other[name] = now
        self.is_in = trained
        return True
