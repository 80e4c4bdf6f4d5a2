"""Attention, Liger's kernels and compiled layers on a GPU, against eager attention in plain torch.

All in bf16 against fp32 on the same GPU: 2% is the rounding of a few bf16 layers.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.data.dealing.collate import MicroBatch, collate
from fsdpq.data.pack import pack_rows
from fsdpq.data.text.tokenize import Row
from fsdpq.fsdp.compiled_layers import apply_compile
from fsdpq.model import document_attention
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.document_attention import use_document_attention
from fsdpq.model.liger import apply_liger_kernels
from fsdpq.model.packing import longest_alone

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU, there is none"),
    pytest.mark.filterwarnings("ignore"),  # of compilers, in torch's and Triton's own code
]
TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOLERANCE = 0.02


BY_DOCUMENT = "sdpa, document by document"


def build(
    attention: str, dtype: torch.dtype, *, liger: bool = False, family: str = "llama"
) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY)
    name = "sdpa" if attention == BY_DOCUMENT else attention
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=name).to("cuda", dtype)
    if liger:
        apply_liger_kernels(hf)
    model = CausalLM(hf)
    model.flattens_packed = attention == "flash_attention_2"
    if attention == BY_DOCUMENT:
        model.longest_alone = longest_alone(hf)
        use_document_attention(hf)
    return model


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    lengths = [120, 60, 200, 30, 90, 11, 70]
    ids = [
        torch.randint(3, 320, (length,), generator=generator).int().numpy() for length in lengths
    ]
    return [Row(each, (np.arange(each.size) > 0).astype(np.uint8)) for each in ids]


def gradients(model: CausalLM, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    batch = batch.to(torch.device("cuda"))
    loss = model(batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids)
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.float() for n, p in named if p.grad is not None}


def assert_close(model: CausalLM, batch: MicroBatch, *, family: str = "llama") -> None:
    loss, found = gradients(model, batch)
    reference = build("eager", torch.float32, family=family)
    wanted_loss, wanted = gradients(reference, collate(rows()))
    assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 2 * TOLERANCE, name


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flex_attention"])
def test_packed_rows_have_the_gradients_of_rows_alone(attention: str) -> None:
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    packed = collate(pack_rows(rows(), 256))
    assert packed.input_ids.shape[0] > 1
    assert_close(build(attention, torch.bfloat16), packed)


# The kernel for documents of any lengths takes bf16; fp32 is computed one after the other.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 50)])
def test_documents_by_themselves_have_the_gradients_of_rows_alone(
    family: str, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, "sliding_window", window)
    model = build(BY_DOCUMENT, dtype, family=family)
    kernels: list[bool] = []
    has_kernel = document_attention.has_varlen_kernel

    def has_varlen_kernel(flat: document_attention.Projected) -> bool:
        kernels.append(has_kernel(flat))
        return kernels[-1]

    monkeypatch.setattr(document_attention, "has_varlen_kernel", has_varlen_kernel)
    assert_close(model, collate(pack_rows(rows(), 256)), family=family)
    assert set(kernels) == {dtype == torch.bfloat16}


def test_liger_kernels_have_the_gradients_of_plain_torch() -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert_close(build("sdpa", torch.bfloat16, liger=True), collate(rows()))


def test_compiled_layers_have_the_gradients_of_plain_torch() -> None:
    model = build("sdpa", torch.bfloat16)
    apply_compile(list(model.decoder_layers))
    assert_close(model, collate(rows()))
