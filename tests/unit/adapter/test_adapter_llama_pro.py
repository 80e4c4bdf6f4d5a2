"""Which layers are new, and which of their linear layers are zeroed, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.adapter.llama_pro import LlamaProAdapter
from fsdpq.adapter.residual import find_residual_linears
from fsdpq.errors import CheckpointError, RecipeError
from fsdpq.model.structure import find_decoder_layers
from fsdpq.recipe.sections.adapter import LlamaProOptions


def _adapter(**options: float) -> LlamaProAdapter:
    return LlamaProAdapter(LlamaProOptions.model_validate({"kind": "llama_pro", **options}))


@pytest.mark.parametrize(
    ("options", "num_layers", "sources"),
    [
        ({"num_new_layers": 1}, 3, (0, 1, 2, 2)),
        ({"num_new_layers": 2}, 4, (0, 1, 1, 2, 3, 3)),
        ({"num_new_layers": 2}, 2, (0, 0, 1, 1)),
        ({"expansion_rate": 0.5}, 4, (0, 1, 1, 2, 3, 3)),
        ({"expansion_rate": 0.333}, 6, (0, 1, 2, 2, 3, 4, 5, 5)),
    ],
)
def test_the_last_layer_of_each_group_is_copied(
    options: dict[str, float], num_layers: int, sources: tuple[int, ...]
) -> None:
    assert _adapter(**options).layer_sources(num_layers) == sources


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"num_new_layers": 4}, "use one of 1, 2, 3, 6"),
        ({"expansion_rate": 0.4}, "use one of 0.1667, 0.3333, 0.5, 1"),
        ({"expansion_rate": 0.1}, "use one of 0.1667, 0.3333, 0.5, 1"),
    ],
)
def test_layers_that_cannot_be_spread_evenly_are_refused(
    options: dict[str, float], hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        _adapter(**options).layer_sources(6)
    [problem] = caught.value.problems
    assert "does not spread new layers evenly over the model's 6" in problem.message
    assert problem.hint == hint


def _find(family: str) -> tuple[str, ...]:
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hf.requires_grad_(False)
    found = find_residual_linears(hf, find_decoder_layers(hf))
    assert not any(parameter.requires_grad for parameter in hf.parameters())
    return found


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("mlp.down_proj", "self_attn.o_proj")),
        ("qwen3", ("mlp.down_proj", "self_attn.o_proj")),
        ("gemma2", ("mlp.down_proj", "self_attn.o_proj")),
        ("granite", ("mlp.down_proj", "self_attn.o_proj")),
        ("phi", ("mlp.fc2", "self_attn.dense")),
        ("gpt_neox", ("attention.dense", "mlp.dense_4h_to_h")),
    ],
)
def test_what_writes_to_the_residual_stream_is_found(family: str, names: tuple[str, ...]) -> None:
    assert _find(family) == names


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot make a new decoder layer the identity"):
        _find("mixtral")
