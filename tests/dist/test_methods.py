"""DoRA, full finetuning and LLaMA Pro, sharded, equal PEFT and plain torch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from fsdpq.data.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.errors import CheckpointError
from support import reference
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama

NUM_STEPS = 3
BATCH = 8
LR = 1e-3
MAX_NORM = 1.0
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]
FULL = {"adapter": {"kind": "none"}, "quantization": {"kind": "none"}}
KEPT = {"fsdp": {"strategy": "shard_grad_op"}}
"""Whole weights are kept from forward to backward."""


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def train_sharded(
    directory: Path, micro_batch_size: int, sections: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trains on this rank; returns losses, gradient norms and an adapter's initial A."""
    assembled = assemble(directory, **sections)
    layers = assembled.adapted_layers
    initial = {name: gather_whole(layer.lora_A).clone() for name, layer in layers.items()}  # pyright: ignore[reportAttributeAccessIssue]
    losses, norms = train(
        assembled, batches(), micro_batch_size=micro_batch_size, lr=LR, max_norm=MAX_NORM
    )
    return {"initial": initial, "losses": losses, "norms": norms}


def _check_equal(answer: dict[str, Any], expected: tuple[list[float], list[float]]) -> None:
    assert len(set(expected[0])) == NUM_STEPS
    # fp32 sums in another order, amplified by three Adam steps: 1e-5 relative.
    assert answer["losses"] == pytest.approx(expected[0], rel=1e-5)
    assert answer["norms"] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(
    ("quantization", "rslora", "fsdp"),
    [
        ({"kind": "bnb"}, False, KEPT),
        ({"kind": "bnb", "quant_type": "fp4"}, True, {}),
        ({"kind": "none"}, False, {}),
    ],
)
def test_dora_equals_unsharded_peft(
    ranks: RankPool,
    tmp_path: Path,
    quantization: dict[str, Any],
    rslora: bool,
    fsdp: dict[str, Any],
) -> None:
    # qwen2 has biases, which DoRA does not scale.
    directory = save_tiny_llama(tmp_path, tied=False, family="qwen2")
    adapter = {"kind": "dora", "rank": 4, "alpha": 8.0, "use_rslora": rslora}
    sections = {"adapter": adapter, "quantization": quantization}
    answers = ranks.run(1, train_sharded, directory, 2, sections)
    answers += ranks.run(2, train_sharded, directory, 2, sections | fsdp)
    model = reference.load_plain(directory)
    if quantization["kind"] == "bnb":
        model = reference.load_dequantized(directory, quantization.get("quant_type", "nf4"))
    peft_model = reference.with_peft_lora(
        model, answers[0]["initial"], rank=4, use_dora=True, use_rslora=rslora
    )
    expected = reference.train(peft_model, batches(), lr=LR, max_norm=MAX_NORM)
    for answer in answers:
        _check_equal(answer, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_full_finetuning_equals_plain_torch(ranks: RankPool, tmp_path: Path, tied: bool) -> None:
    directory = save_tiny_llama(tmp_path, tied=tied)
    expected = reference.train(reference.load_plain(directory), batches(), lr=LR, max_norm=MAX_NORM)
    # Eight rows one at a time on three ranks: one rank has an empty micro-batch.
    for num_ranks, micro_batch_size, fsdp in [(1, 4, {}), (2, 2, KEPT), (3, 1, {})]:
        sections = FULL | fsdp
        for answer in ranks.run(num_ranks, train_sharded, directory, micro_batch_size, sections):
            _check_equal(answer, expected)


def bf16_masters(directory: Path) -> dict[str, Any]:
    """Trains in bf16; returns what is kept and computed in which dtype."""
    assembled = assemble(directory, model={"dtype": "bf16"}, **FULL)
    seen: set[torch.dtype] = set()
    for layer in assembled.model.decoder_layers:
        layer.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    before = [gather_whole(p).clone() for p in assembled.trainable]
    _, norms = train(assembled, batches()[:2], micro_batch_size=4, lr=1e-5, max_norm=None)
    moved = [not torch.equal(gather_whole(p), b) for p, b in zip(assembled.trainable, before)]
    return {
        "masters": {p.dtype for p in assembled.trainable},
        "computed": seen,
        "moved": all(moved),
        "norms": norms,
    }


def test_bf16_computes_on_casts_of_fp32_masters(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path)
    for answer in ranks.run(2, bf16_masters, directory):
        assert answer["masters"] == {torch.float32}
        assert answer["computed"] == {torch.bfloat16}
        # bf16 weights near 0.02 would not move by steps of 1e-5.
        assert answer["moved"]
        plain = reference.load_plain(directory)
        _, norms = reference.train(plain, batches()[:2], lr=1e-5, max_norm=1e9)
        assert answer["norms"] == pytest.approx(norms, rel=0.03), "bf16 has 8 bits"


def expanded_reference(directory: Path, *, group: int, quantized: bool) -> nn.Module:
    """Returns transformers' model with a copy of the last of each ``group`` layers behind it."""
    original = reference.load_dequantized(directory) if quantized else reference.load_plain(directory)
    config = AutoConfig.from_pretrained(directory)
    sources = []
    for index in range(config.num_hidden_layers):
        sources += [index, index] if (index + 1) % group == 0 else [index]
    config.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[source] for source in sources]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rest = {k: v for k, v in original.state_dict().items() if ".layers." not in k}
    model.load_state_dict(rest, strict=False)
    model.requires_grad_(False)
    for index, source in enumerate(sources):
        layer = model.model.layers[index]
        layer.load_state_dict(original.model.layers[source].state_dict())  # pyright: ignore
        if index and sources[index - 1] == source:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.requires_grad_(True)
                for parameter in linear.parameters():
                    parameter.data.zero_()
    return model


@pytest.mark.parametrize("kind", ["bnb", "none"])
def test_llama_pro_equals_plain_torch(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    directory = save_tiny_llama(tmp_path, num_hidden_layers=4)
    model = expanded_reference(directory, group=2, quantized=kind == "bnb")
    expected = reference.train(model, batches(), lr=LR, max_norm=MAX_NORM)
    sections = {
        "adapter": {"kind": "llama_pro", "num_new_layers": 2},
        "quantization": {"kind": kind},
    }
    for num_ranks, fsdp in [(1, {}), (2, KEPT), (3, {})]:
        for answer in ranks.run(num_ranks, train_sharded, directory, 2, sections | fsdp):
            _check_equal(answer, expected)


def expanded_logits(directory: Path, kind: str, num_new: int) -> dict[str, Any]:
    """Returns the logits of an expanded model before training, and what would be trained."""
    adapter = {"kind": "llama_pro", "num_new_layers": num_new}
    model = assemble(directory, adapter=adapter, quantization={"kind": kind}).model.eval()
    cache = DynamicCache(config=model.hf.config)
    # In two parts, so that the second reads the cache of every layer.
    model.next_token_logits(torch.tensor([PROMPT[:5]]), cache)
    logits = model.next_token_logits(torch.tensor([PROMPT[5:]]), cache)[0]
    trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return {"logits": logits, "trained": trained, "num_layers": len(model.decoder_layers)}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "bnb"), ("llama", "none"), ("mistral", "bnb"), ("qwen2", "bnb"), ("qwen3", "bnb"),
        ("olmo2", "none"), ("gemma3_text", "none"),
    ],
)  # fmt: skip
def test_an_expanded_model_starts_as_the_original(
    ranks: RankPool, tmp_path: Path, family: str, kind: str
) -> None:
    changes = {"head_dim": 48} if family in ("qwen3", "gemma3_text") else {}
    directory = save_tiny_llama(tmp_path, tied=False, family=family, **changes)
    load = reference.load_dequantized if kind == "bnb" else reference.load_plain
    with torch.no_grad():
        expected = load(directory).eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    answer = ranks.run(2, expanded_logits, directory, kind, 3)[0]
    assert answer["num_layers"] == 6
    assert {name.split(".")[3] for name in answer["trained"]} == {"1", "3", "5"}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in answer["trained"]} == {
        "o_proj", "down_proj",
    }  # fmt: skip
    # fp32, sums in another order.
    bound = 2e-5 * expected.abs().max().item()
    assert torch.allclose(answer["logits"], expected, rtol=0, atol=bound)


def test_parallel_blocks_with_other_names_expand_too(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path, tied=False, family="phi")
    model = reference.load_plain(directory).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    answer = ranks.run(1, expanded_logits, directory, "none", 1)[0]
    assert len(answer["trained"]) == 4, "weights and biases of attention's and MLP's output"
    bound = 2e-5 * expected.abs().max().item()
    assert torch.allclose(answer["logits"], expected, rtol=0, atol=bound)


def test_full_finetuning_of_a_quantized_base_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path)
    sections = {"adapter": {"kind": "none"}}
    expected = f"{CheckpointError.__name__}.*nothing is left to quantize"
    with pytest.raises(AssertionError, match=expected):
        ranks.run(1, train_sharded, directory, 2, sections)
