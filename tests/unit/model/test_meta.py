"""Building on meta: what is swapped, what stays, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny_llama, tiny_recipe
from torch import nn
from transformers import AutoConfig

from fsdpq.errors import CheckpointError, EnvironmentProblemError
from fsdpq.model.causal_lm import logit_scale
from fsdpq.model.loading.targets import checkpoint_name
from fsdpq.model.meta import build_meta_model, count_parameters
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.quantization.none import NoQuantizer
from fsdpq.recipe.sections.quantization import BnbOptions, NoQuantOptions
from fsdpq.worker.quantize import build_frozen_model


def _build(directory: Path, *, attn_implementation: str = "sdpa", **options: object):
    quantizer = BnbQuantizer(BnbOptions.model_validate({"kind": "bnb", **options}))
    return build_meta_model(
        directory,
        dtype=torch.bfloat16,
        attn_implementation=attn_implementation,
        quantizer=quantizer,
    )


def test_every_linear_of_the_layers_is_swapped_and_nothing_has_memory(tmp_path: Path) -> None:
    model = _build(save_tiny_llama(tmp_path))
    swapped = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(swapped) == 3 * 7
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert model.embedding.weight is model.head.weight
    num_parameters, num_quantized = count_parameters(model)
    per_layer = 192 * 192 * 2 + 192 * 96 * 2 + 3 * 192 * 320
    assert num_quantized == 3 * per_layer
    assert num_parameters == num_quantized + 331 * 192 + 7 * 192


def test_attention_that_is_not_installed_is_a_problem_of_the_machine(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(EnvironmentProblemError) as caught:
        _build(tmp_path, attn_implementation="flash_attention_2")
    assert "FlashAttention2" in caught.value.message
    assert caught.value.hint == "set `model.attn_implementation: sdpa`"
    # Quantizing computes no attention: a base can be made on another machine.
    model = {"name_or_path": "tiny", "attn_implementation": "flash_attention_2"}
    recipe = tiny_recipe(model=model | {"use_liger_kernel": True})
    frozen = build_frozen_model(recipe, tmp_path, dtype=torch.bfloat16, trust_remote_code=False)
    assert frozen.hf.config._attn_implementation == "eager"


def test_modules_not_to_convert_stay_linear(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    model = _build(tmp_path, modules_to_not_convert=("o_proj", "mlp.down_proj"))
    plain = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert plain == {"o_proj", "down_proj"}
    with pytest.raises(CheckpointError, match="names oproj, which this model does not have"):
        _build(tmp_path, modules_to_not_convert=("oproj",))


def test_no_quantizer_swaps_nothing(tmp_path: Path) -> None:
    model = build_meta_model(
        save_tiny_llama(tmp_path, tied=False),
        dtype=torch.float32,
        attn_implementation="eager",
        quantizer=NoQuantizer(NoQuantOptions(kind="none")),
    )
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert len(model.embedding_groups) == 2


@pytest.mark.parametrize(
    ("family", "weight"),
    [("gpt_oss", "mlp.experts.gate_up_proj"), ("gpt2", "attn.c_attn.weight")],
)
def test_weights_that_no_linear_holds_are_not_passed_by(
    tmp_path: Path, family: str, weight: str
) -> None:
    sizes = {"num_local_experts": 4} if family == "gpt_oss" else {"n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, **sizes,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    unquantized = NoQuantizer(NoQuantOptions(kind="none"))
    build_meta_model(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", quantizer=unquantized
    )
    with pytest.raises(CheckpointError, match="would silently stay unquantized") as caught:
        _build(tmp_path, attn_implementation="eager")
    assert weight in caught.value.message


def test_a_directory_without_a_model_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(CheckpointError, match="cannot build the model"):
        _build(tmp_path)


def test_a_checkpoint_quantized_by_another_library_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    path = tmp_path / "config.json"
    method = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    with pytest.raises(CheckpointError, match=r"quantized already .*gptq") as caught:
        _build(tmp_path)
    assert "name the unquantized repository" in caught.value.hint


def test_an_attention_that_the_family_lacks_is_explained(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    AutoConfig.for_model("gemma2", **sizes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        _build(tmp_path)
    assert caught.value.hint == "set `model.attn_implementation: eager`"


def test_a_scaled_head_of_an_unknown_family_is_refused() -> None:
    assert logit_scale(AutoConfig.for_model("granite", logits_scaling=8.0)) == 1 / 8
    with pytest.raises(CheckpointError, match="`hyperclovax` change their logits"):
        logit_scale(AutoConfig.for_model("hyperclovax", logits_scaling=8.0))


def test_our_names_map_to_the_checkpoints() -> None:
    name = "hf.model.layers.0.self_attn.q_proj.base.weight"
    assert checkpoint_name(name) == "model.layers.0.self_attn.q_proj.weight"
