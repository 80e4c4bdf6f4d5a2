"""Do packed documents see each other on this device, and what does packing cost?"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.dist import start_process_group
from fsdpq.metrics.peaks import release
from fsdpq.model.causal_lm import CausalLM
from fsdpq.worker.bench.shapes import Batch, with_layers
from scripts.gpu.parts import Bench
from scripts.gpu.training import Sections, build_trainer, measure

FIRST, SECOND = 200, 184
"""Tokens of the documents: no multiples of the kernels' blocks."""

CONFIG: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def isolation(bench: Bench) -> None:
    """Compares document 2 behind different documents 1, and alone, for each attention."""
    for attention in _attentions(bench):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{attention}, {str(dtype).removeprefix('torch.')}"
            bench.rows.attempt(name, _isolation, bench.device, attention, dtype)


def _attentions(bench: Bench) -> list[str]:
    flash = importlib.util.find_spec("flash_attn") is not None
    on_cuda = bench.device.type == "cuda"
    compiled = ["flex_attention"] if on_cuda else []
    return ["sdpa", "eager", *compiled, *(["flash_attention_2"] if flash and on_cuda else [])]


def _isolation(device: torch.device, attention: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **CONFIG)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model = CausalLM(hf.to(device))
    model.flattens_packed = attention == "flash_attention_2"
    generator = torch.Generator().manual_seed(1)
    first, other, second = (
        torch.randint(3, 320, (n,), generator=generator) for n in (FIRST, FIRST, SECOND)
    )
    restart = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])
    packed = [_of_second(model, torch.cat([each, second]), restart) for each in (first, other)]
    alone = _of_second(model, second, torch.arange(SECOND))
    run_on = torch.arange(FIRST + SECOND)
    leaking = [_of_second(model, torch.cat([each, second]), run_on) for each in (first, other)]
    return {
        "logits_moved": _apart(packed[0][0], packed[1][0]),
        "gradients_moved": max(map(_apart, packed[0][1], packed[1][1])),
        "logits_from_alone": _apart(packed[0][0], alone[0]),
        "gradients_from_alone": max(map(_apart, packed[0][1], alone[1])),
        "logits_moved_without_restart": _apart(leaking[0][0], leaking[1][0]),
        "gradients_moved_without_restart": max(map(_apart, leaking[0][1], leaking[1][1])),
    }


def _of_second(model: CausalLM, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits of document 2, and the gradients of its loss by all weights of the layers."""
    device = model.head.weight.device
    model.zero_grad(set_to_none=True)
    hidden = model._decode(ids[None].to(device), positions[None].to(device)).last_hidden_state
    logits = model.head(hidden[0, -SECOND:]).float()
    targets = ids[-SECOND + 1 :].to(device)
    torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum").backward()
    gradients = [p.grad.float() for p in model.decoder_layers.parameters() if p.grad is not None]
    return logits.detach(), gradients


def _apart(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


def cost(bench: Bench) -> None:
    """Measures rows of one and of many documents, 8 layers of 7B."""
    device = start_process_group(bench.device.type)
    shape = with_layers(bench.shape("7b"), 2 if bench.tiny else 8)
    for attention in ("sdpa", "flex_attention") if device.type == "cuda" else ("sdpa",):
        batch = Batch(1, bench.tokens(8192))
        sections: Sections = {"model": {"attn_implementation": attention}}
        name = f"{attention}, {batch}"
        trainer = bench.rows.build(
            name, build_trainer, shape, batch.tokens, device, lora_rank=16, sections=sections
        )
        for documents in (1, 16) if trainer else ():
            words = f"{name}, {documents} documents"
            given = {"rounds": 3, "warmups": 2, "documents": documents}
            bench.rows.attempt(words, measure, trainer, batch, **given)
        del trainer
        release(device)
