"""Which models have a load-balancing loss, with which coefficient, and that it is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, MORE_FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.router_loss import RouterLoss, build_router_loss

ALL = FAMILIES | MORE_FAMILIES
BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "ernie4_5_moe")
"""gpt_oss is in `tests/dist/test_router_loss_training.py`."""


def build(family: str, **changes: Any) -> PreTrainedModel:
    """Returns a random model of one family, tiny."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **(sizes | tokens | ALL[family] | changes))
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_is_that_of_the_familys_own_forward(family: str) -> None:
    hf = build(family, output_router_logits=True)
    ids = torch.randint(3, 61, (3, 7))
    is_token = torch.arange(7) < torch.tensor([[4], [7], [5]])
    with torch.no_grad():
        expected = hf(ids, attention_mask=is_token.long())
        model = CausalLM(hf)
        model.router_loss = build_router_loss(hf, None)
        positions = torch.tensor([0, 1, 8])
        losses = model.losses(ids, positions, ids.flatten()[positions + 1], None, is_token)
    assert model.router_loss is not None
    assert model.router_loss.coefficient == hf.config.router_aux_loss_coef
    assert losses.router == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    unpadded = model.router_loss(model._decode(ids, None, record_routers=True).router_logits, ids)
    assert losses.router != pytest.approx(unpadded.item(), rel=1e-6)


def coefficient_of(loss: RouterLoss | None) -> float | None:
    """Returns the coefficient, None for no loss."""
    return None if loss is None else loss.coefficient


def test_the_recipe_decides_before_the_config() -> None:
    silent = build("mixtral", router_aux_loss_coef=0.02)
    asking = build("mixtral", router_aux_loss_coef=0.02, output_router_logits=True)
    assert coefficient_of(build_router_loss(silent, None)) is None
    assert coefficient_of(build_router_loss(asking, None)) == 0.02
    for hf in (silent, asking):
        assert coefficient_of(build_router_loss(hf, 0.0)) is None
        assert coefficient_of(build_router_loss(hf, 0.3)) == 0.3


def test_a_config_that_asks_records_nothing_for_a_loss_that_is_off() -> None:
    model = CausalLM(build("mixtral", output_router_logits=True))
    output = model._decode(torch.tensor([[5, 6]]), None)
    assert "router_logits" not in output


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("deepseek_v3", {}),  # routers, balanced by a bias
        ("doge", {}),  # the function is another one
        ("granitemoehybrid", {"num_local_experts": 0, "layer_types": ["attention"] * 2}),
    ],
)
def test_models_without_the_loss_refuse_a_coefficient(family: str, changes: dict[str, Any]) -> None:
    ALL.setdefault(family, {})
    hf = build(family, **changes)
    assert build_router_loss(hf, None) is None
    assert build_router_loss(hf, 0.0) is None
    with pytest.raises(CheckpointError, match="no load-balancing loss for") as caught:
        build_router_loss(hf, 0.1)
    assert type(hf).__name__ in caught.value.message
    assert "router_aux_loss_coef" in caught.value.hint


def test_chunks_that_are_no_whole_layer_are_noticed() -> None:
    loss = build_router_loss(build("mixtral"), 1.0)
    assert loss is not None
    chunks = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)]
    with pytest.raises(RuntimeError, match="no whole layers"):
        loss(chunks, torch.ones(2, 4, dtype=torch.bool))
