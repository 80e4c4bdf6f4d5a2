"""Decoder-only families load, quantize and compute as transformers does, by structure alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from support import reference
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import save_tiny_llama

PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 48, "query_pre_attn_scalar": 48, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 48},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS | {"head_dim": 48},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 48},
    "gemma2": GEMMA | {"final_logit_softcapping": 0.5},
    "gemma3_text": GEMMA,
    "phi3": {},
    "phi": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
ONLY_EAGER = {"gemma2"}


def logits_and_loss(
    directory: Path, attn_implementation: str
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Returns the logits after the prompt, the loss on it, and what is left on meta."""
    changes = {"attn_implementation": attn_implementation}
    model = assemble(directory, model=changes).model.eval()
    ids = torch.tensor([PROMPT])
    logits = model.next_token_logits(ids, DynamicCache(config=model.hf.config))[0]
    with torch.no_grad():
        loss = model(ids, torch.arange(len(PROMPT) - 1), ids[0, 1:])
    tensors = (*model.named_parameters(), *model.named_buffers())
    return logits, loss, [name for name, tensor in tensors if tensor.is_meta]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_equal_transformers(ranks: RankPool, tmp_path: Path, family: str) -> None:
    directory = save_tiny_llama(tmp_path, tied=False, family=family, **FAMILIES[family])
    attention = "eager" if family in ONLY_EAGER else "sdpa"
    model = reference.load_dequantized(directory, attn_implementation=attention).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    expected_loss = functional.cross_entropy(expected[:-1], ids[0, 1:], reduction="sum")
    for logits, loss, on_meta in ranks.run(2, logits_and_loss, directory, attention):
        assert on_meta == []
        # fp32, sums in another order.
        atol = 2e-5 * expected[-1].abs().max().item()
        assert torch.allclose(logits, expected[-1], rtol=0, atol=atol)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
