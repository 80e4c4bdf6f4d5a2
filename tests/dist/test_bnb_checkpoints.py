"""Checkpoints that are quantized already are loaded as stored, and equal stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from fsdpq.model.loading.targets import checkpoint_name
from fsdpq.model.quantized_linear import PackedMatrix
from support.bnb_repository import (
    EXPERTS,
    dequantized,
    load_stock,
    save_quantized,
    stored_tensors,
)
from support.ranks import RankPool
from support.sharded import assemble

MIXTURES = ("mixtral", "qwen2_moe")
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]


def load_quantized(directory: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """Loads on this rank; returns whole packed tensors, dequantized weights and logits."""
    assembled = assemble(directory, quantization={"kind": "bnb", **quantization})
    packed: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, module in assembled.model.named_modules():
        if isinstance(module, PackedMatrix):
            whole = {n: getattr(module, n).full_tensor() for n in module.packed_names}
            key = checkpoint_name(name)
            packed[key] = whole
            shape = (module.out_features, module.in_features)
            weights[key] = module.quantizer.dequantize(whole, shape, torch.float32)
    model = assembled.model.eval()
    cache = DynamicCache(config=model.hf.config)
    logits = model.next_token_logits(torch.tensor([PROMPT]), cache)[0]
    return {"packed": packed, "weights": weights, "logits": logits, "notice": assembled.notice}


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"bnb_4bit_use_double_quant": True}, {}),
    ("llama", {"bnb_4bit_quant_type": "fp4"}, {}),
    # Rows of 100 weights: blocks of 64 cross them.
    ("llama", {"bnb_4bit_use_double_quant": True}, {"hidden_size": 100, "head_dim": 26}),
    ("llama", {"bnb_4bit_quant_storage": torch.bfloat16}, {"hidden_size": 100, "head_dim": 26}),
    ("llama", {"llm_int8_skip_modules": ["lm_head", "o_proj"]}, {}),
    ("phi3", {}, {}),
    ("mixtral", {"bnb_4bit_use_double_quant": True}, EXPERTS),
    # Its shared expert's gate is a linear of one row, which transformers quantizes too.
    ("qwen2_moe", {}, {"num_experts": 4, "moe_intermediate_size": 64,
                       "shared_expert_intermediate_size": 128}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "stored", "sizes"), CASES)
def test_loaded_bits_and_logits_equal_stock_transformers(
    ranks: RankPool,
    tmp_path: Path,
    family: str,
    stored: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    directory = save_quantized(tmp_path, family=family, sizes=sizes, **stored)
    model = load_stock(directory).eval()
    weights, tensors = dequantized(model), stored_tensors(directory)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    told = {
        "quant_type": stored.get("bnb_4bit_quant_type", "nf4"),
        "double_quant": stored.get("bnb_4bit_use_double_quant", False),
    }
    for num_ranks in (1, 3) if stored.get("bnb_4bit_use_double_quant") else (2,):
        for answer in ranks.run(num_ranks, load_quantized, directory, told):
            assert answer["weights"].keys() == weights.keys()
            for name, weight in weights.items():
                packed = answer["packed"][name]
                codes = tensors[f"{name}.weight"].view(torch.uint8).flatten()
                assert torch.equal(packed["codes"].flatten(), codes), name
                absmax = tensors[f"{name}.weight.absmax"]
                assert torch.equal(packed["absmax"].flatten(), absmax.view(torch.uint8)), name
                assert torch.equal(answer["weights"][name], weight), name
            # fp32, sums in another order.
            atol = 2e-5 * expected.abs().max().item()
            assert torch.allclose(answer["logits"], expected, rtol=0, atol=atol)
            skips = "o_proj" in stored.get("llm_int8_skip_modules", ())
            assert ("3 linear layers" in answer["notice"]) == skips
            assert ("6 stacks of experts" in answer["notice"]) == bool(family in MIXTURES)
