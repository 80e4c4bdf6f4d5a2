"""Where a model's shape comes from, and what is said where it cannot be told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fsdpq.cards.find import CARDS, find_card
from fsdpq.errors import CheckpointError
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes import find_shape, shape_from_card, shape_from_directory

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
NORMS = {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
Shapes = dict[str, tuple[int, ...]]


def llama_weights(num_layers: int = 2, prefix: str = "model.") -> Shapes:
    """Returns the tensors of the tiny Llama."""
    layers = {
        f"{prefix}layers.{index}.{name}.weight": shape
        for index in range(num_layers)
        for name, shape in (LINEARS | NORMS).items()
    }
    outside = {f"{prefix}embed_tokens": (100, 64), f"{prefix}norm": (64,), "lm_head": (100, 64)}
    return layers | {f"{name}.weight": shape for name, shape in outside.items()}


def save(directory: Path, config: dict[str, Any], *files: Shapes, dtype: str = "BF16") -> Path:
    """Writes a checkpoint of zeros, sorted by name as transformers sorts it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for number, shapes in enumerate(files):
        fields: dict[str, Any] = {}
        end = 0
        for name, shape in sorted(shapes.items()):
            size = 1 if dtype == "U8" else 2
            start, end = end, end + size * math.prod(shape)
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(fields).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(end)
        (directory / f"part-{number}.safetensors").write_bytes(content)
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        shape_from_directory(directory)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_gives_all_weights_of_its_model(card) -> None:
    shape = shape_from_card(card)
    assert shape.num_weights == card.num_parameters
    assert shape.num_layers == card.num_layers
    [layer] = shape.layers
    linears = {tensor.name.removesuffix(".weight") for tensor in layer.tensors}
    assert set(shape.residual_linears) <= linears or shape.num_experts
    names = [tensor.name for group in shape.groups for tensor in group.tensors]
    assert len(set(names)) == len(names)


def test_headers_and_config_of_a_known_family_agree(tmp_path: Path) -> None:
    from_config = shape_from_directory(save(tmp_path / "config", LLAMA))
    found = shape_from_directory(save(tmp_path / "whole", LLAMA, llama_weights()))
    assert (from_config.source, found.source) == ("config", "headers")
    assert found.groups == from_config.groups
    files = (tmp_path / "whole").glob("*.safetensors")
    assert found.checkpoint_bytes == sum(path.stat().st_size for path in files)
    assert from_config.checkpoint_bytes is None


def test_headers_have_the_last_word(tmp_path: Path) -> None:
    weights = llama_weights() | {
        f"model.layers.{index}.self_attn.q_proj.bias": (64,) for index in range(2)
    }
    shape = shape_from_directory(save(tmp_path, LLAMA, weights))
    assert shape.num_weights == sum(map(math.prod, weights.values()))
    assert shape.head_dim == 16
    assert shape.residual_linears == ("mlp.down_proj", "self_attn.o_proj")


def test_a_layer_that_is_cut_over_two_files_is_one_layer(tmp_path: Path) -> None:
    weights = {f"h.{name}": shape for name, shape in llama_weights().items()}
    names = sorted(weights)
    halves = [{name: weights[name] for name in names[start::2]} for start in range(2)]
    shape = shape_from_directory(save(tmp_path, LLAMA | {"model_type": "new"}, *halves))
    assert [group.count for group in shape.layers] == [2]
    assert shape.layers_prefix == "h.model.layers."


def test_layers_of_two_sorts_keep_their_numbers(tmp_path: Path) -> None:
    weights = llama_weights(num_layers=5)
    for index in (1, 3):
        del weights[f"model.layers.{index}.self_attn.q_proj.weight"]
    config = LLAMA | {"model_type": "new", "num_hidden_layers": 5}
    shape = shape_from_directory(save(tmp_path, config, weights))
    assert [group.indices for group in shape.layers] == [(0, 2, 4), (1, 3)]
    assert [shape.layer_indices(group) for group in shape.layers] == [(0, 2, 4), (1, 3)]


def test_layers_that_predict_further_tokens_are_no_layers(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "new"}
    shape = shape_from_directory(save(tmp_path, config, llama_weights(num_layers=3)))
    assert shape.num_layers == 2


def test_a_head_that_a_config_ties_is_counted_once(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "new", "tie_word_embeddings": True}
    weights = llama_weights()
    shape = shape_from_directory(save(tmp_path / "both", config, weights))
    del weights["lm_head.weight"]
    alone = shape_from_directory(
        save(tmp_path / "one", config | {"tie_word_embeddings": False}, weights)
    )
    for found in (shape, alone):
        assert [group.name for group in found.groups] == ["layer", "embedding", "root"]
        assert found.num_weights == sum(map(math.prod, weights.values()))
        [table] = found.groups[1].tensors
        assert table.tied_name == "lm_head.weight"


def test_the_language_model_of_a_model_that_sees_is_found(tmp_path: Path) -> None:
    tower = {f"vision.blocks.{index}.fc.weight": (8, 8) for index in range(40)}
    config = {"model_type": "seeing", "text_config": LLAMA, "vision_config": {"hidden_size": 8}}
    weights = llama_weights(prefix="language_model.model.") | tower
    shape = shape_from_directory(save(tmp_path, config, weights))
    assert (shape.num_layers, shape.layers_prefix) == (2, "language_model.model.layers.")
    assert (shape.hidden_size, shape.num_attention_heads) == (64, 4)
    assert shape.num_weights == sum(map(math.prod, weights.values()))


def test_experts_of_files_are_the_stacks_of_transformers(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "new", "num_experts": 3, "num_experts_per_tok": 2}
    weights = llama_weights()
    for index in range(2):
        block = f"model.layers.{index}.mlp"
        weights |= {f"{block}.gate.weight": (3, 64), f"{block}.shared_expert_gate.weight": (1, 64)}
        for expert in range(3):
            weights |= {
                f"{block}.experts.{expert}.gate_proj.weight": (32, 64),
                f"{block}.experts.{expert}.up_proj.weight": (32, 64),
                f"{block}.experts.{expert}.down_proj.weight": (64, 32),
            }
    shape = shape_from_directory(save(tmp_path, config, weights))
    [layer] = shape.layers
    kinds = {tensor.name: (tensor.kind, tensor.shape) for tensor in layer.tensors}
    assert kinds["mlp.experts.gate_up_proj"] == ("experts", (3, 64, 64))
    assert kinds["mlp.experts.down_proj"] == ("experts", (3, 64, 32))
    assert kinds["mlp.gate.weight"] == ("router", (3, 64))
    assert kinds["mlp.shared_expert_gate.weight"] == ("linear", (1, 64))
    assert (shape.num_experts, shape.num_experts_per_tok) == (3, 2)
    assert shape.moe_intermediate_size == 32
    assert shape.num_weights == sum(map(math.prod, weights.values()))


def test_weights_of_bitsandbytes_are_told_from_those_that_stay(tmp_path: Path) -> None:
    stored = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    weights: Shapes = {"model.embed_tokens.weight": (100, 64)}
    for index in range(2):
        for name in LINEARS:
            weights[f"model.layers.{index}.{name}.weight"] = (2048, 1)
            if name != "mlp.down_proj":
                weights[f"model.layers.{index}.{name}.weight.absmax"] = (64,)
    config = LLAMA | {"quantization_config": stored}
    shape = shape_from_directory(save(tmp_path, config, weights, dtype="U8"))
    [layer] = shape.layers
    plain = [tensor.name for tensor in layer.tensors if tensor.stays_plain]
    assert (shape.stored_as, plain) == ("bnb", ["mlp.down_proj.weight"])


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    new = LLAMA | {"model_type": "new"}
    assert "it has no safetensors weights" not in refusal(save(tmp_path / "empty", new))
    assert "there are no weights" in refusal(tmp_path / "empty")
    assert "`new`, of which there is no card" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    assert "pickle weights only" in refusal(tmp_path / "empty")
    gptq = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    assert "quantized already, by gptq" in refusal(save(tmp_path / "gptq", gptq, llama_weights()))
    deep = new | {"num_hidden_layers": 7}
    assert "looked for 7 of them" in refusal(save(tmp_path / "deep", deep, llama_weights()))
    wide = new | {"vocab_size": 99}
    assert "has 99 rows" in refusal(save(tmp_path / "wide", wide, llama_weights()))
    stored = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    packed = new | {"quantization_config": stored}
    assert "packed weights" in refusal(save(tmp_path / "packed", packed, llama_weights()))


def test_damaged_weights_of_a_known_family_leave_its_config(tmp_path: Path) -> None:
    directory = save(tmp_path, LLAMA, llama_weights())
    (directory / "part-0.safetensors").write_bytes(b"no header")
    assert shape_from_directory(directory).source == "config"


def test_a_directory_goes_before_a_card(tmp_path: Path) -> None:
    name = "meta-llama/Llama-2-7b-hf"
    card = find_card(name)
    assert card is not None
    assert find_shape(name, tmp_path) == shape_from_card(card)
    assert find_shape("org/unknown", tmp_path) is None
    (tmp_path / "meta-llama").mkdir()
    save(tmp_path / name, LLAMA, llama_weights())
    found = find_shape(name, tmp_path)
    assert isinstance(found, ModelShape)
    assert (found.hidden_size, found.is_here) == (64, True)
