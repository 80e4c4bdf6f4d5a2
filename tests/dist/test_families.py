"""Decoder-only families load, quantize and compute as transformers does, by structure alone.

The reference is transformers' model with the linears of the quantization library itself. What a
plan says of each is compared with the shards that are there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import reference
from support.families import FAMILIES, MORE_FAMILIES, ONLY_EAGER
from support.library_linears import with_library_linears
from support.ranks import RankPool
from support.sharded import assemble
from support.shards import ShardBytes, planned_bytes, real_bytes
from support.tiny import save_tiny_llama, tiny_recipe
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from fsdpq.plan.shapes import shape_from_directory
from fsdpq.plan.weights import plan_weights

PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]
ALL = FAMILIES | (MORE_FAMILIES if os.environ.get("FSDPQ_FAMILIES") == "all" else {})

QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"kind": "bnb", "quant_type": "fp4", "double_quant": False}),
    ("qwen2", {"kind": "bnb", "block_size": 4096}),  # blocks cross rows; biases
    ("gpt_neox", {"kind": "bnb", "quant_type": "fp4", "block_size": 256}),  # fused, biases
    ("mistral", {"kind": "bnb", "modules_to_not_convert": ["o_proj", "down_proj"]}),
    ("llama", {"kind": "hqq", "nbits": 4}),
    ("mixtral", {"kind": "hqq", "nbits": 4, "group_size": 16}),
    ("qwen3_moe", {"kind": "hqq", "nbits": 3}),
    ("phi3", {"kind": "hqq", "nbits": 2, "group_size": 16}),  # fused
    ("falcon", {"kind": "hqq", "nbits": 8, "group_size": 32}),  # fused
    ("stablelm", {"kind": "hqq", "nbits": 4, "group_size": None}),
    ("olmo", {"kind": "hqq", "nbits": 1, "group_size": 32}),
    ("gemma2", {"kind": "hqq", "nbits": 4, "group_size": 32, "axis": 0}),
    ("qwen2_moe", {"kind": "hqq", "nbits": 2, "group_size": 16, "axis": 0}),
    ("gpt_oss", {"kind": "hqq", "nbits": 3, "group_size": 16, "axis": 0}),  # transposed experts
    ("gpt_oss", {"kind": "hqq", "nbits": 8, "group_size": 64}),
    ("qwen3", {"kind": "none"}),
]


def logits_and_loss(
    directory: Path, attn_implementation: str, quantization: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, list[str], ShardBytes]:
    """Returns the logits after the prompt, the loss on it, what is left on meta, and the shards."""
    changes = {"attn_implementation": attn_implementation}
    assembled = assemble(directory, model=changes, quantization=quantization)
    model, shards = assembled.model.eval(), real_bytes(assembled.model, assembled.num_groups)
    ids = torch.tensor([PROMPT])
    logits = model.next_token_logits(ids, DynamicCache(config=model.hf.config))[0]
    with torch.no_grad():
        loss = model(ids, torch.arange(len(PROMPT) - 1), ids[0, 1:])
    tensors = (*model.named_parameters(), *model.named_buffers())
    return logits, loss, [name for name, tensor in tensors if tensor.is_meta], shards


def _check_family(
    ranks: RankPool, directory: Path, family: str, quantization: dict[str, Any], tied: bool = False
) -> None:
    save_tiny_llama(directory, tied=tied, family=family, **ALL[family])
    attention = "eager" if family in ONLY_EAGER else "sdpa"
    model = reference.load_plain(directory, attn_implementation=attention).eval()
    if quantization["kind"] != "none":
        model = with_library_linears(model, quantization)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    expected_loss = functional.cross_entropy(expected[:-1], ids[0, 1:], reduction="sum")
    answers = ranks.run(2, logits_and_loss, directory, attention, quantization)
    recipe = tiny_recipe(quantization=quantization)
    assert answers[0][3] == planned_bytes(plan_weights(recipe, shape_from_directory(directory)))
    for logits, loss, on_meta, _ in answers:
        assert on_meta == []
        # fp32, sums in another order.
        atol = 2e-5 * expected[-1].abs().max().item()
        assert torch.allclose(logits, expected[-1], rtol=0, atol=atol)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_logits_and_loss_equal_transformers_with_linear4bit(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    _check_family(ranks, tmp_path, family, {"kind": "bnb"})


@pytest.mark.parametrize(("family", "quantization"), QUANTIZERS)
def test_logits_and_loss_equal_transformers_with_the_librarys_linear(
    ranks: RankPool, tmp_path: Path, family: str, quantization: dict[str, Any]
) -> None:
    _check_family(ranks, tmp_path, family, quantization, tied=family == "llama")


def heads(directory: Path, quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the weights of embedding and head, whole."""
    hf = assemble(directory, model={"dtype": "bf16"}, quantization=quantization).model.hf
    both = {"embed": hf.get_input_embeddings(), "head": hf.get_output_embeddings()}
    return {name: module.weight.full_tensor() for name, module in both.items()}


@pytest.mark.parametrize("quantization", [{"kind": "bnb"}, {"kind": "hqq"}])
def test_the_head_stays_in_the_models_dtype(
    ranks: RankPool, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    stored = load_file(save_tiny_llama(tmp_path, tied=False) / "model.safetensors")
    for answer in ranks.run(2, heads, tmp_path, quantization):
        assert torch.equal(answer["head"], stored["lm_head.weight"].bfloat16())
        assert torch.equal(answer["embed"], stored["model.embed_tokens.weight"].bfloat16())
