"""Packed documents do not see each other, in every family and attention that says so."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.flash import FakeFlashAttention, install_fake_flash_attention
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.data.dealing.collate import MicroBatch, collate
from fsdpq.data.pack import pack_rows
from fsdpq.data.text.tokenize import Row
from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.document_attention import use_document_attention
from fsdpq.model.packing import check_packing_isolates, longest_alone, needs_document_mask

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": MOE,
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": [
        "sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_neox": {},
    "stablelm": {},
    "olmo2": {},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
"""Families that are given the mask which they would make without position ids."""

ALONE = "sdpa, document by document"


def _model(family: str, attention: str, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(TINY | (FAMILIES | MASKED).get(family, {}) | changes))
    hf = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa" if attention == ALONE else attention
    )
    # Random weights of the usual size attend almost evenly; larger ones make a leak visible.
    for parameter in hf.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model = CausalLM(hf.eval())
    model.masks_packed = needs_document_mask(hf)
    assert model.masks_packed == (family in MASKED)
    if attention == ALONE:
        model.longest_alone = longest_alone(hf)
        assert model.longest_alone == sys.maxsize
        use_document_attention(hf)
    return model


def _row(length: int, seed: int, *, trained: bool = True) -> Row:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (length,), generator=generator).int().numpy()
    return Row(ids, (trained & (np.arange(length) > 0)).astype(np.uint8))


def _loss(model: CausalLM, batch: MicroBatch) -> Tensor:
    return model(batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids)


def _gradients(model: CausalLM, batch: MicroBatch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = _loss(model, batch)
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in (ALONE, "sdpa", "eager")]
    + [(f, a) for f in MASKED for a in ("sdpa", "eager")],
)
def test_the_second_document_does_not_notice_the_first(family: str, attention: str) -> None:
    model = _model(family, attention)
    model.head.weight.requires_grad_(False)
    check_packing_isolates(model.hf)
    second = _row(9, 1)
    results = []
    for seed in (2, 3):
        [packed] = pack_rows([_row(11, seed, trained=False), second], 20)
        results.append(_gradients(model, collate([packed])))
    alone = _gradients(model, collate([second]))
    for loss, gradients in results:
        # fp32; another shape of the same sums: 1e-5 relative
        assert loss == pytest.approx(alone[0], rel=1e-5)
        for name, gradient in gradients.items():
            bound = 1e-5 * alone[1][name].abs().max().item() + 3e-7  # of OPT's biases: 0
            assert torch.allclose(gradient, alone[1][name], rtol=0, atol=bound), name
    [packed] = pack_rows([_row(11, 2, trained=False), second], 20)
    leaking = collate([packed])
    with torch.no_grad():
        seen = model(leaking.input_ids, leaking.loss_positions, leaking.targets).item()
    assert abs(seen - alone[0]) > 1e-3, "without position ids the documents must see each other"


@pytest.mark.parametrize("attention", [ALONE, "sdpa", "eager"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_rows(attention: str) -> None:
    model = _model("llama", attention)
    model.head.weight.requires_grad_(False)
    rows = [_row(length, seed) for seed, length in enumerate([5, 9, 3, 12, 7, 4, 16])]
    packed = collate(pack_rows(rows, 16))
    assert packed.input_ids.shape[0] < len(rows)
    loss, gradients = _gradients(model, packed)
    expected, wanted = _gradients(model, collate(rows))
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-5), name


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    """flash-attn in plain torch: what it is told is transformers' and ours."""
    return install_fake_flash_attention(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_keeps_the_documents_of_several_rows_apart(
    family: str, flash: FakeFlashAttention
) -> None:
    rows = [_row(length, seed) for seed, length in enumerate([5, 9, 3, 12, 7, 4, 16])]
    packed = collate(pack_rows(rows, 16))
    assert 1 < packed.input_ids.shape[0] < len(rows)
    model = _model(family, "flash_attention_2")
    model.head.weight.requires_grad_(False)
    assert model.hf.config._attn_implementation == "flash_attention_2"
    check_packing_isolates(model.hf)
    model.flattens_packed = True
    loss, gradients = _gradients(model, packed)
    assert set(flash.calls) == {"varlen"}
    reference = _model(family, "eager")
    reference.head.weight.requires_grad_(False)
    expected, wanted = _gradients(reference, collate(rows))
    assert loss == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    for name, gradient in gradients.items():
        bound = 2e-5 * wanted[name].abs().max().item() + 1e-6
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=bound), name


def test_flash_attention_needs_the_bounds_of_more_than_one_row(flash: FakeFlashAttention) -> None:
    rows = [_row(length, seed) for seed, length in enumerate([5, 9, 3, 12, 7, 4, 16])]
    packed = pack_rows(rows, 16)
    model = _model("llama", "flash_attention_2")
    with torch.no_grad():
        alone = _loss(model, collate(rows)).item()
        one_by_one = sum(_loss(model, collate([row])).item() for row in packed)
        assert set(flash.calls) == {"dense", "varlen"}
        flash.calls.clear()
        together = _loss(model, collate(packed)).item()
    assert one_by_one == pytest.approx(alone, rel=1e-5)
    assert flash.calls == ["dense", "dense"]
    assert abs(together - alone) > 1e-3, "transformers reads the position ids of several rows now"


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention is compiled, by g++")
@pytest.mark.filterwarnings("ignore")  # dynamo looks at everything, also at what warns
def test_flex_attention_on_a_cpu_computes_the_same_and_cannot_be_trained() -> None:
    rows = [_row(length, seed) for seed, length in enumerate([5, 9, 3, 12])]
    packed = collate(pack_rows(rows, 16))
    model = _model("llama", "flex_attention")
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        _loss(model, packed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = _loss(_model("llama", "eager"), collate(rows)).item()
    assert _loss(model, packed).item() == pytest.approx(expected, rel=1e-5)


def _refused(family: str, **changes: Any) -> str:
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError) as caught:
        check_packing_isolates(hf)
    assert "data.packing=none" in caught.value.hint
    return caught.value.message


def test_families_whose_documents_would_leak_are_refused() -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64}
    alibi = _refused("falcon", alibi=True, num_attention_heads=4, **small)
    assert "has ALiBi positions: packed documents would see each other" in alibi
    bloom = _refused("bloom", n_head=4, n_layer=2, hidden_size=32, vocab_size=64)
    assert "does not build its attention mask from position ids" in bloom
    assert "`linear_attention`" in _refused("mamba", **small)


def test_families_that_keep_positions_from_flash_attention_are_refused() -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64}
    config = AutoConfig.for_model("falcon", num_attention_heads=4, **small)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hf.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CheckpointError, match="does not hand position ids to flash attention"):
        check_packing_isolates(hf)
