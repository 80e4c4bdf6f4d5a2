"""DoRA in other dtypes, bf16 masters and expanded models; test_parity_matrix has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import library_models, reference
from support.ranks import RankPool
from support.sharded import assemble, train, whole_a
from support.tiny import random_rows, save_tiny_llama
from transformers.cache_utils import DynamicCache

from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.errors import CheckpointError
from fsdpq.protocols import DTYPES

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
    initial = whole_a(assembled)
    losses, norms = train(
        assembled, batches(), micro_batch_size=micro_batch_size, lr=LR, max_norm=MAX_NORM
    )
    return {"initial": initial, "losses": losses, "norms": norms}


@pytest.mark.parametrize(
    ("quantization", "dtype", "rslora", "losses_rel", "norms_rel"),
    [
        # fp32 sums in another order, amplified by three Adam steps.
        ({"kind": "bnb", "quant_type": "fp4"}, "fp32", True, 1e-5, 1e-5),
        # Two ways to round to the 8 bits of bf16. Gradients of either are within 1.1% of fp32's,
        # and Adam gives those that are nearly zero the steps of large ones.
        ({"kind": "none"}, "bf16", False, 3e-4, 3e-2),
    ],
)
def test_dora_equals_unsharded_peft(
    ranks: RankPool,
    tmp_path: Path,
    quantization: dict[str, Any],
    dtype: str,
    rslora: bool,
    losses_rel: float,
    norms_rel: float,
) -> None:
    # qwen2 has biases, which DoRA does not scale.
    directory = save_tiny_llama(tmp_path, tied=False, family="qwen2")
    adapter = {"kind": "dora", "rank": 4, "alpha": 8.0, "use_rslora": rslora}
    sections = {"adapter": adapter, "quantization": quantization, "model": {"dtype": dtype}}
    answers = ranks.run(2, train_sharded, directory, 2, sections | KEPT)
    model = library_models.build(
        directory, adapter, quantization, answers[0]["initial"], DTYPES[dtype]
    )
    losses, norms = reference.train(model, batches(), lr=LR, max_norm=MAX_NORM)
    assert len(set(losses)) == NUM_STEPS
    for answer in answers:
        assert answer["losses"] == pytest.approx(losses, rel=losses_rel)
        assert answer["norms"] == pytest.approx(norms, rel=norms_rel)


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
