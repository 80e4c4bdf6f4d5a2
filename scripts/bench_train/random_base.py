"""Random bases made on the device, for shapes that nobody wants to write to a disk first.

Both ways to train get the same weights: each is drawn from a generator seeded by its name.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fsdpq.dist import own_shard
from fsdpq.model.loading.source import BaseSource
from fsdpq.model.loading.stream import load_base
from fsdpq.model.loading.targets import LoadingTarget, packed_shards
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.worker.assemble import (
    Assembled,
    apply_adapter,
    build_model,
    resolve_dtype,
    shard_model,
)
from scripts.bench_train.shapes import Shape

STD = 0.02
"""Of the weights, as transformers initialises Llama."""


def random_weight(
    name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns the weight ``name``; those of norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=STD, generator=generator)


class RandomSource:
    """Fills a base with random weights, quantized on the device; see `BaseSource`.

    Args:
        dtype: of the weights before they are quantized.
        device: where they are made.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills one target. Memory: the whole matrix."""
        packed = isinstance(target, PackedMatrix)
        shape = (target.out_features, target.in_features) if packed else tuple(target.shape)
        weight = random_weight(name, shape, dtype=self._dtype, device=self._device)
        if isinstance(target, PackedMatrix):
            read = lambda start, stop: weight[start:stop]  # noqa: E731
            target.quantizer.quantize_shards(read, weight.shape, packed_shards(target))
        else:
            shard = own_shard(target)
            shard.rows.copy_(weight[shard.start : shard.stop])


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
    dtype = resolve_dtype(recipe, device)
    adapter: Any = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    with tempfile.TemporaryDirectory() as directory:
        config = LlamaConfig(**shape.config(tokens), architectures=["LlamaForCausalLM"])
        config.save_pretrained(directory)
        model = build_model(recipe, Path(directory), adapter, dtype=dtype, trust_remote_code=False)
    apply_adapter(model, adapter)
    num_groups, notice = shard_model(model, recipe, device, precision=precision_of(recipe))
    fsdp = recipe.fsdp
    load_base(
        model, source or RandomSource(dtype=dtype, device=device), dtype=dtype, device=device,
        offload=fsdp.offload, offload_trained=fsdp.offload_trained,
        report=lambda _done, _total: None,
    )  # fmt: skip
    adapter.init_adapter(model, seed=0, dtype=dtype, device=device)
    return Assembled(model, shape.num_weights, 0, num_groups, (notice,) if notice else ())


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
