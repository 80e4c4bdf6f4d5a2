"""The reference: transformers + PEFT + bitsandbytes, as their documentation calls them.

Nothing else of fsdpq's benchmarks imports peft or bitsandbytes. What they train is the same model
on the same batch, its weights drawn from the same generators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fsdpq.worker.bench.contenders import (
    DTYPES,
    LR,
    MAX_NORM,
    ContenderOptions,
    RunStep,
    batch_ids,
)
from fsdpq.worker.bench.shapes import Batch, Shape
from fsdpq.worker.random_base import random_weight

CHECKPOINTING = {"use_reentrant": False}


def build_transformers(options: ContenderOptions, *, prepare: bool) -> RunStep:
    """Returns a step of stock libraries.

    Args:
        options: of the model.
        prepare: call ``prepare_model_for_kbit_training``, which makes everything fp32 that is not
            quantized; without it the base is frozen and checkpointed, and stays in its dtype.
    """
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if options.checkpoint is None:
        model = random_4bit(options.shape, options.tokens, dtype=dtype, device=device)
    else:
        model = load_4bit(options.checkpoint, dtype=dtype, device=device)
    if prepare:
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs=CHECKPOINTING
        )
    else:
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    model.config.use_cache = False
    torch.manual_seed(0)  # the same start in every process
    peft_model = add_lora(model, rank=options.lora_rank)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def run(batch: Batch) -> float:
        ids = batch_ids(options.shape, batch).to(device)
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def load_4bit(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns the model of a checkpoint in NF4 with double quantization."""
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=options, dtype=dtype, device_map=str(device)
    )


def add_lora(model: Any, *, rank: int, use_dora: bool = False) -> Any:
    """Returns ``model`` in PEFT's wrapper, with adapters on all linears, in train mode."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0,
        use_dora=use_dora,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    wrapped.train()
    return wrapped


def random_4bit(shape: Shape, tokens: int, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns what ``from_pretrained(load_in_4bit)`` makes of the random weights of a shape."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape.config(tokens), dtype=dtype))
        model = model.to(dtype)
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
