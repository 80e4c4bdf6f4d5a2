"""The unsharded reference: transformers, PEFT's LoRA, bitsandbytes' functional API, plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fsdpq.data.text.tokenize import Row

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""


def load_dequantized(
    directory: Path,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """Returns the model with every linear inside its layers rounded to 4 bits and back.

    Experts, which transformers keeps as parameters of three dimensions, are rounded as one matrix,
    stacked on top of each other. Linears of a single row, gates, and of as many rows as there are
    experts, routers, stay as they are.
    """
    model = load_plain(directory, dtype, attn_implementation=attn_implementation)
    kept = {1, *(getattr(model.config, name, 1) for name in NUM_EXPERTS)}
    for name, module in model.named_modules():
        in_layer = any(part.isdigit() for part in name.split("."))
        if in_layer and isinstance(module, nn.Linear) and module.out_features not in kept:
            module.weight.data = round_weight(module.weight.data, quant_type)
    for parameter in model.parameters():
        if parameter.dim() == 3 and parameter.shape[1] > 1:
            rounded = round_weight(parameter.data.flatten(0, 1), quant_type)
            parameter.data = rounded.view_as(parameter)
    return model


def load_plain(
    directory: Path, dtype: torch.dtype = torch.float32, *, attn_implementation: str = "sdpa"
) -> nn.Module:
    """Returns the model as it is."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attn_implementation
    )


def round_weight(weight: Tensor, quant_type: str = "nf4") -> Tensor:
    """Returns a weight quantized and dequantized by bitsandbytes, scales quantized too."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=True
    )
    return bnb.dequantize_4bit(codes, state)


def with_peft_lora(
    model: nn.Module, initial_a: dict[str, Tensor], *, rank: int, **options: Any
) -> nn.Module:
    """Adds PEFT's LoRA (alpha = 2 * rank) with given values of A; B is zero."""
    targets = sorted({name.rpartition(".")[2] for name in initial_a})
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0, **options
    )
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            weight = initial_a[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(weight)
    return peft_model


def batch_loss(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Mean token loss over all rows, one row at a time: no padding, no batching."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        kept = torch.tensor(row.loss_mask[1:], dtype=torch.bool)
        total = total + nn.functional.cross_entropy(logits[kept], ids[0, 1:][kept], reduction="sum")
    return total / sum(row.num_trained for row in rows)


def train(
    model: nn.Module, batches: Sequence[Sequence[Row]], *, lr: float, max_norm: float
) -> tuple[list[float], list[float]]:
    """Trains with plain torch; returns losses and gradient norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    norms: list[float] = []
    for rows in batches:
        loss = batch_loss(model, rows)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def train_with_masters(
    model: nn.Module,
    masters: Sequence[Tensor],
    batches: Sequence[Sequence[Row]],
    *,
    lr: float,
    max_norm: float,
    autocast: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Trains weights kept apart from those that compute: plain mixed precision, in plain torch.

    The model's trainable parameters are copies of the masters, whatever dtype they have, and their
    unscaled gradients go to AdamW over the masters. Returns losses and gradient norms.
    """
    working = [p for p in model.parameters() if p.requires_grad]
    kept = [nn.Parameter(master.clone()) for master in masters]
    optimizer = torch.optim.AdamW(kept, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    norms: list[float] = []

    def copy_masters() -> None:
        for used, master in zip(working, kept, strict=True):
            used.data.copy_(master.data)

    copy_masters()
    for rows in batches:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = batch_loss(model, rows)
        (loss * loss_scale).backward()
        for used, master in zip(working, kept, strict=True):
            assert used.grad is not None
            master.grad = (used.grad.float() / loss_scale).to(master.dtype)
            used.grad = None
        # In fp32: `clip_grad_norm_` computes the norm in the dtype of the gradients.
        norm = torch.nn.utils.get_total_norm([m.grad.float() for m in kept if m.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(kept, max_norm, norm)
        norms.append(float(norm))
        optimizer.step()
        copy_masters()
        losses.append(loss.item())
    return losses, norms
