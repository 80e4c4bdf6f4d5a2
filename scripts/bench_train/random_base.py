"""Random bases made on the device, for shapes that nobody wants to write to a disk first.

Both ways to train get the same weights: each is drawn from a generator seeded by its name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fsdpq.model.loading.source import BaseSource
from fsdpq.recipe.root import Recipe
from fsdpq.worker import random_base
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.random_base import random_weight
from scripts.bench_train.shapes import Shape


def assemble_random(
    recipe: Recipe,
    shape: Shape,
    tokens: int,
    *,
    device: torch.device,
    source: BaseSource | None = None,
) -> Assembled:
    """Returns what ``assemble_model`` does for a checkpoint with these weights, on one rank.

    Args:
        recipe: of the run.
        shape: of the model.
        tokens: the longest row.
        device: this rank's.
        source: of the base instead of these weights.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = LlamaConfig(**shape.config(tokens), architectures=["LlamaForCausalLM"])
        config.save_pretrained(directory)
        return random_base.assemble_random(recipe, Path(directory), device=device, source=source)


def random_4bit(shape: Shape, tokens: int, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns the model that ``from_pretrained(load_in_4bit)`` makes of these weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config(tokens), dtype=dtype)).to(dtype)
    for layer_name, layer in model.model.layers.named_modules():
        for attribute, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                name = f"model.layers.{layer_name}.{attribute}.weight"
                setattr(layer, attribute, _linear4bit(name, child, dtype, device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            weight = random_weight(name, tuple(parameter.shape), dtype=dtype, device=device)
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
    rotary = type(model.model.rotary_emb)
    with device:
        model.model.rotary_emb = rotary(model.config)  # its buffers are on meta
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def _linear4bit(
    name: str, linear: nn.Linear, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    shape = (linear.out_features, linear.in_features)
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=dtype, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    params: Any = bitsandbytes.nn.Params4bit
    weight = random_weight(name, shape, dtype=dtype, device=device)
    layer.weight = params(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    return layer
