"""A plan's bytes are those of the real shards: same model, same groups, no weight allocated.

The reference is the model that a run builds, on meta, sharded by FSDP2 over ranks that are faked.
Families are compared where they are loaded anyway, in ``test_families.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.shards import planned_bytes, shard_on_meta
from support.tiny import tiny_recipe
from transformers import AutoConfig

from fsdpq.model.loading.base_layout import plan_layout
from fsdpq.plan.base_file import weights_bytes
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.plan.weights import plan_weights
from fsdpq.registry import ROWS
from fsdpq.worker.quantize import build_frozen_model

MODELS = ["llama", "tied", "experts", "biases"]
LORA: dict[str, Any] = {"kind": "lora", "rank": 4}
DORA: dict[str, Any] = {"kind": "dora", "rank": 5}
FULL: dict[str, Any] = {"kind": "none"}
NF4: dict[str, Any] = {"kind": "bnb"}
PLAIN: dict[str, Any] = {"kind": "none"}
HQQ: dict[str, Any] = {"kind": "hqq", "group_size": 32}

QUANTIZERS: list[dict[str, Any]] = [
    NF4,
    NF4 | {"double_quant": False},
    NF4 | {"quant_type": "fp4", "block_size": 256},  # blocks cross rows
    NF4 | {"modules_to_not_convert": ["o_proj", "1.mlp.down_proj"]},
    *(HQQ | {"nbits": nbits} for nbits in (8, 4, 3, 2, 1)),
    HQQ | {"axis": 0},
    HQQ | {"nbits": 3, "axis": 0, "group_size": 16},
    HQQ | {"group_size": None},
    PLAIN,
]
ADAPTERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (DORA, NF4),
    (LORA | {"target_modules": ["q_proj", "mlp.down_proj"]}, NF4),
    (LORA | {"target_modules": r".*layers\.[02]\..*(q|v)_proj"}, NF4),
    (LORA | {"modules_to_save": ["lm_head", "embed_tokens"]}, NF4),
    (LORA | {"modules_to_save": ["input_layernorm", "k_proj"]}, HQQ),
    (DORA | {"modules_to_save": ["norm", "lm_head"]}, NF4),
    ({"kind": "llama_pro", "num_new_layers": 2}, NF4),
    (FULL, PLAIN),
]
STRATEGIES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"offload": "cpu"}),
    (1, {"precision": "bf16"}),
    (1, {"precision": {"param": "bf16", "reduce": "bf16"}}),
    (2, {"strategy": "ddp"}),
    (2, {"strategy": "ddp", "offload": "cpu"}),
    (4, {"strategy": "hybrid_full_shard"}),
    (6, {"strategy": "hybrid_shard_grad_op", "shard_size": 3}),
    (3, {"precision": "bf16"}),
]


def test_every_quantizer_and_method_is_here() -> None:
    for section, options in (
        ("quantization", QUANTIZERS),
        ("adapter", [LORA, *(adapter for adapter, _ in ADAPTERS)]),
    ):
        kinds = {row.kind for row in ROWS if row.section == section}
        assert {each["kind"] for each in options} == kinds


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny models' config.json, by their names here. All sizes are odd."""
    odd = {
        "vocab_size": 331,
        "hidden_size": 224,
        "intermediate_size": 480,
        "num_hidden_layers": 4,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    configs = {
        "llama": ("llama", odd),
        "tied": ("llama", odd | {"tie_word_embeddings": True}),
        "experts": ("qwen3_moe", odd | experts),
        "biases": ("phi", odd | {"num_key_value_heads": 7}),
    }
    found: dict[str, Path] = {}
    for name, (family, options) in configs.items():
        found[name] = tmp_path_factory.mktemp(name)
        AutoConfig.for_model(family, **options).save_pretrained(found[name])
    return found


def check(directory: Path, num_ranks: int, **sections: dict[str, Any]) -> None:
    """Compares the plan of a recipe with the model that it builds."""
    launch = {"device": "cpu", "nproc_per_node": num_ranks}
    recipe = tiny_recipe(**({"model": {"dtype": "bf16"}} | sections), launch=launch)
    planned = planned_bytes(plan_weights(recipe, shape_from_directory(directory)))
    assert planned == shard_on_meta(recipe, directory)


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("model", ["llama", "experts"])
def test_shards_are_as_large_as_planned_for_any_number_of_ranks(
    directories: dict[str, Path], model: str, num_ranks: int
) -> None:
    check(directories[model], num_ranks)


@pytest.mark.parametrize("quantization", QUANTIZERS, ids=str)
@pytest.mark.parametrize("model", ["llama", "experts"])
def test_shards_are_as_large_as_planned_for_every_quantizer(
    directories: dict[str, Path], model: str, quantization: dict[str, Any]
) -> None:
    if model == "experts" and quantization.get("modules_to_not_convert"):
        quantization = NF4 | {"modules_to_not_convert": ["experts", "1.self_attn.q_proj"]}
    check(directories[model], 3, quantization=quantization)


@pytest.mark.parametrize(
    ("adapter", "quantization", "num_ranks", "fsdp"),
    [(*method, *STRATEGIES[at]) for method in ADAPTERS for at in (0, 4, 8)]
    + [(*ADAPTERS[at], *strategy) for at in (0, 3, 7) for strategy in STRATEGIES],
    ids=str,
)
def test_shards_are_as_large_as_planned_for_every_method_and_strategy(
    directories: dict[str, Path],
    adapter: dict[str, Any],
    quantization: dict[str, Any],
    num_ranks: int,
    fsdp: dict[str, Any],
) -> None:
    model = "llama" if adapter.get("modules_to_save") == ["norm", "lm_head"] else "tied"
    check(directories[model], num_ranks, adapter=adapter, quantization=quantization, fsdp=fsdp)


@pytest.mark.parametrize("model", MODELS)
def test_the_file_of_a_quantized_base_is_as_large_as_planned(
    directories: dict[str, Path], model: str
) -> None:
    quantization = HQQ | {"nbits": 3, "modules_to_not_convert": ["0.self_attn.o_proj"]}
    if model == "biases":
        quantization = NF4
    recipe = tiny_recipe(quantization=quantization, model={"dtype": "bf16"})
    whole = build_frozen_model(
        recipe, directories[model], dtype=torch.bfloat16, trust_remote_code=False
    )
    planned = weights_bytes(recipe, shape_from_directory(directories[model]))
    assert planned == plan_layout(whole).num_bytes
