"""Checkpoints that are quantized already are loaded as stored, and equal stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.bnb_repository import (
    EXPERTS,
    change_tensors,
    dequantized,
    load_stock,
    save_quantized,
    stored_tensors,
)
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows
from transformers.cache_utils import DynamicCache

from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.errors import CheckpointError
from fsdpq.model.loading.targets import checkpoint_name
from fsdpq.model.quantized_linear import PackedMatrix

MIXTURES = ("mixtral", "qwen2_moe")
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]


def load_quantized(directory: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """Loads on this rank; returns whole packed tensors, dequantized weights and logits."""
    assembled = assemble(directory, quantization={"kind": "bnb", **quantization})
    packed: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, module in assembled.model.named_modules():
        if isinstance(module, PackedMatrix):
            whole = {n: gather_whole(getattr(module, n)) for n in module.packed_names}
            key = checkpoint_name(name)
            packed[key] = whole
            shape = (module.out_features, module.in_features)
            weights[key] = module.quantizer.dequantize(whole, shape, torch.float32)
    model = assembled.model.eval()
    cache = DynamicCache(config=model.hf.config)
    logits = model.next_token_logits(torch.tensor([PROMPT]), cache)[0]
    return {
        "packed": packed,
        "weights": weights,
        "logits": logits,
        "notice": " ".join(assembled.notices),
    }


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


def train_quantized(directory: Path) -> dict[str, Any]:
    """Trains on this rank; returns losses, gradient norms and the initial adapter."""
    assembled = assemble(directory, quantization={"kind": "bnb", "double_quant": True})
    layers: dict[str, Any] = dict(assembled.adapted_layers)
    initial = {n: gather_whole(layer.lora_A).clone() for n, layer in layers.items()}
    losses, norms = train(assembled, batches(), micro_batch_size=2, lr=1e-3, max_norm=1.0)
    return {"initial": initial, "losses": losses, "norms": norms}


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(24)
    return [rows[start : start + 8] for start in range(0, 24, 8)]


def test_training_equals_peft_on_the_stock_4bit_model(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_quantized(tmp_path, bnb_4bit_use_double_quant=True)
    answers = ranks.run(2, train_quantized, directory)
    model = reference.with_peft_lora(load_stock(directory), answers[0]["initial"], rank=4)
    losses, norms = reference.train(model, batches(), lr=1e-3, max_norm=1.0)
    for answer in answers:
        # fp32 sums in another order.
        assert answer["losses"] == pytest.approx(losses, rel=1e-5)
        assert answer["norms"] == pytest.approx(norms, rel=1e-5)


def refusal(directory: Path, quantization: dict[str, Any]) -> str:
    """Returns what this rank says of a checkpoint."""
    try:
        assemble(directory, quantization=quantization)
    except CheckpointError as error:
        return f"{error.message} | {error.hint}"
    return ""


def test_damaged_or_foreign_checkpoints_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_quantized(tmp_path, bnb_4bit_use_double_quant=True)
    told = {"kind": "bnb", "double_quant": True}

    def refused(**changes: Any) -> str:
        [message] = ranks.run(1, refusal, directory, told | changes)
        return message

    assert refused() == ""
    assert "has block_size 64, the recipe says 128" in refused(block_size=128)
    assert "quantized already with `quant_type: nf4`" in refused(quant_type="fp4")
    assert "names `0.self_attn.o_proj`" in refused(modules_to_not_convert=["o_proj"])
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    table = stored_tensors(directory)[f"{down}.quant_map"]
    change_tensors(directory, **{f"{down}.quant_map": table.flip(0).contiguous()})
    assert f"`{down}.quant_map` is not the table of bitsandbytes" in refused()
    change_tensors(
        directory,
        **{f"{up}.absmax": None, f"{down}.nested_absmax": torch.zeros(7), f"{up}.odd": table},
    )
    message = refused()
    assert f"missing `{up}.absmax`" in message
    assert f"`{down}.nested_absmax` has shape [7], its matrix needs [4]" in message
