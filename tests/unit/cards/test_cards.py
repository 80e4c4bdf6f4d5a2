"""Model cards against published parameter counts and against transformers' own models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fsdpq.cards.families import FAMILIES
from fsdpq.cards.find import CARDS, card_from_config, find_card
from fsdpq.fetch.catalog import MODELS
from fsdpq.plan.shapes import shape_from_card

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "01-ai/Yi-6B": 6_061_035_520,
    "01-ai/Yi-34B": 34_388_917_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-pt": 999_885_952,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "tiiuae/falcon-7b": 6_921_720_704,
    "microsoft/phi-2": 2_779_683_840,
    "stabilityai/stablelm-2-1_6b": 1_644_417_024,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
}
"""As the model cards, papers and safetensors headers on the hub say."""

EXTRA = {"stablelm": {"use_qkv_bias": True}, "phi3": {"pad_token_id": 0}}
SMALLEST = {
    card.model_type: card for card in sorted(CARDS, key=lambda card: -card.num_layer_parameters)
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_parameters_match_the_published_count(card):
    base_name = card.name.removesuffix("-Instruct").removesuffix("-Base")
    published = PUBLISHED[card.name if card.name in PUBLISHED else base_name]
    # StableLM's published count leaves out the biases of its norms; the others are exact.
    tolerance = 0.0001 if card.model_type == "stablelm" else 0
    assert abs(card.num_parameters - published) <= tolerance * published


def test_names_are_unique_and_found_in_any_case():
    names = [name.lower() for card in CARDS for name in (card.name, *card.aliases)]
    assert len(set(names)) == len(names)
    card = find_card("META-llama/llama-2-7B-hf")
    assert card is not None
    assert card.name == "meta-llama/Llama-2-7b-hf"
    assert find_card("meta-llama/Llama-2-8b-hf") is None


def test_every_packaged_model_has_a_card():
    assert all(find_card(f"pypi:{name}") is not None for name in MODELS)


def test_every_family_has_a_card():
    assert set(SMALLEST) == set(FAMILIES)


def config_facts(card):
    """What transformers' config class takes for ``card``."""
    facts = {
        "num_hidden_layers": card.num_layers,
        "hidden_size": card.hidden_size,
        "intermediate_size": card.intermediate_size,
        "num_attention_heads": card.num_attention_heads,
        "num_key_value_heads": card.num_key_value_heads,
        "head_dim": card.head_dim,
        "vocab_size": card.vocab_size,
        "max_position_embeddings": card.max_position_embeddings,
        "tie_word_embeddings": card.tie_word_embeddings,
        "sliding_window": card.sliding_window,
        **EXTRA.get(card.model_type, {}),
    }
    if card.num_experts:
        facts |= {
            "num_experts_per_tok": card.num_experts_per_tok,
            "moe_intermediate_size": card.moe_intermediate_size,
            "num_local_experts" if card.model_type == "mixtral" else "num_experts": (
                card.num_experts
            ),
        }
    if card.model_type == "falcon":
        del facts["num_key_value_heads"], facts["head_dim"]
        facts["ffn_hidden_size"] = facts.pop("intermediate_size")
    if card.model_type in ("gpt_neox", "phi", "falcon"):
        facts = {name: fact for name, fact in facts.items() if fact is not None}
        facts.pop("head_dim", None)
    return facts


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_weights_are_those_of_transformers(model_type):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    card = replace(SMALLEST[model_type], num_layers=2)
    config = AutoConfig.for_model(model_type, **config_facts(card))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert card.num_parameters == sum(weight.numel() for weight in model.parameters())

    names = [name for name, _ in model.named_parameters()]
    layer = next(name.partition(".1.")[0] for name in names if ".1." in name)
    found = {
        name.removeprefix(f"{layer}.1.").removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if name.startswith(f"{layer}.1.") and weight.ndim > 1
    }
    said = {
        shape.name: (shape.count, shape.out_features, shape.in_features)[shape.count == 1 :]
        for shape in card.linear_shapes
    }
    assert said == found
    # The same, with the names of norms, tables and layers, as a plan counts them.
    assert named_tensors(shape_from_card(card)) == {
        name: tuple(weight.shape) for name, weight in model.named_parameters()
    }


def named_tensors(shape):
    """Returns every tensor of a shape by its whole name."""
    found = {}
    for group in shape.groups:
        indices = shape.layer_indices(group) if group.name == "layer" else [None]
        prefixes = ["" if i is None else f"{shape.layers_prefix}{i}." for i in indices]
        found |= {p + tensor.name: tensor.shape for p in prefixes for tensor in group.tensors}
    return found


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_file_of_transformers_gives_the_same_card(model_type, tmp_path):
    from transformers import AutoConfig

    card = SMALLEST[model_type]
    AutoConfig.for_model(model_type, **config_facts(card)).save_pretrained(tmp_path)
    read = card_from_config(tmp_path)
    assert read is not None
    if model_type == "falcon":  # transformers writes no intermediate size that is the default
        assert read.intermediate_size == 4 * card.hidden_size
    assert replace(read, name="", license="") == replace(card, name="", license="", aliases=())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model_type": "gpt2"}', '{"model_type": "llama"}', "\x00",
     '{"model_type": []}',
     '{"model_type": "falcon", "num_attention_heads": 8, "hidden_size": 8, "multi_query": false}',
     '{"model_type": "llama", "num_attention_heads": 0, "hidden_size": 8}',
     '{"model_type": "llama", "num_attention_heads": "8", "hidden_size": 8}', "[" * 100000],
)  # fmt: skip
def test_a_config_that_says_too_little_gives_no_card(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert card_from_config(tmp_path) is None


def test_a_missing_config_gives_no_card(tmp_path):
    assert card_from_config(tmp_path / "nowhere") is None


def test_sizes_left_out_of_a_config_are_derived(tmp_path: Path):
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100,
        "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = card_from_config(tmp_path / "config.json")
    assert card is not None
    assert (card.num_key_value_heads, card.head_dim, card.tie_word_embeddings) == (4, 16, False)


def tiny(card):
    """The same architecture, small enough to run at once."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    kv_heads = {"falcon": 1, "gpt_neox": 4}.get(card.model_type, 2)
    window = None if card.sliding_window is None else 32
    return replace(
        card, num_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, vocab_size=64, max_position_embeddings=64,
        sliding_window=window, **(experts if card.num_experts else {}),
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_packed_documents_are_isolated_where_the_family_says_so(model_type, attention):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **config_facts(tiny(SMALLEST[model_type])))
    torch.manual_seed(0)
    if attention in family.lacks_attention:
        with pytest.raises(ValueError, match="does not support"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    positions = torch.arange(8).repeat(2)[None]
    first = torch.randint(1, 64, (2, 8))
    second = torch.randint(1, 64, (1, 8)).expand(2, -1)
    with torch.no_grad():
        rows = torch.cat([first, second], dim=1)
        out = model(input_ids=rows, position_ids=positions.expand(2, -1), use_cache=False)
    # Bit for bit: the masked positions contribute exact zeros.
    same = torch.equal(out.logits[0, 8:], out.logits[1, 8:])
    assert same == family.isolates_documents
