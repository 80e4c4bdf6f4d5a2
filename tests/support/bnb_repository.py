"""Checkpoints with 4-bit weights of bitsandbytes, as transformers writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.tiny import save_tiny_llama

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def save_quantized(
    directory: Path,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Saves a tiny model twice: ``plain``, and ``quantized``, which is returned.

    Args:
        directory: where to.
        family: of the model.
        dtype: of the weights that are quantized.
        sizes: changes to the tiny config.
        options: of transformers' ``BitsAndBytesConfig``.
    """
    plain = save_tiny_llama(directory / "plain", tied=False, family=family, **(sizes or {}))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        **({"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | options),
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype)
    model.save_pretrained(directory / "quantized")
    return directory / "quantized"


def load_stock(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns what transformers makes of a checkpoint, quantized layers as ``Linear4bit``.

    On a CPU with AVX512-BF16 their first forward without gradients would repack the weight for a
    kernel that rounds to bf16 and takes no number of rows that 32 does not divide. They are kept
    from it, so that they multiply with the weight as it is stored.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint, as the files hold them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a checkpoint of one file; None takes one out."""
    path = directory / "model.safetensors"
    tensors = {n: t for n, t in (load_file(path) | changes).items() if t is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def dequantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every ``Linear4bit`` weight of a model, dequantized by bitsandbytes.

    Before any forward: that of ``Linear4bit`` may repack the weight on some CPUs.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    return {
        name: bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in layers.items()
    }
