"""GGUF to safetensors: bits, rows and names, against torch and llama.cpp's own formula."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fsdpq.errors import FetchError
from fsdpq.fetch.bf16_safetensors import TensorPlan, round_to_bf16, write_bf16
from fsdpq.fetch.gguf_llama import convert_gguf_llama, unpermuted_rows

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 4, 2, 8, 48


def permute(weights, num_heads):
    """Literally what llama.cpp's converter does to q and k."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def test_bf16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (np.arange(0, 4000, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45], dtype=np.float32)
    values = np.concatenate([random.view(np.float32), ties.view(np.float32), edges])
    ours = round_to_bf16(values)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    as_float = (ours[nan].astype(np.uint32) << 16).view(np.float32)
    assert np.isnan(as_float).all()


def test_written_file_loads_with_safetensors(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    plans = [TensorPlan("a", (6, 4)), TensorPlan("b.c", (4,))]
    write_bf16(tmp_path / "x.safetensors", plans, iter([values[:4], values[4:], values[0]]))
    loaded = load_file(tmp_path / "x.safetensors")
    assert str(loaded["a"].dtype) == "torch.bfloat16"
    np.testing.assert_array_equal(loaded["a"].float().numpy(), values)
    np.testing.assert_array_equal(loaded["b.c"].float().numpy(), values[0])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_that_do_not_fill_a_tensor_are_refused(tmp_path, num_rows):
    rows = [np.zeros(4, dtype=np.float32)] * num_rows
    with pytest.raises(ValueError, match=r"misses|more rows"):
        write_bf16(tmp_path / "x.safetensors", [TensorPlan("a", (2, 4))], iter(rows))


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_unpermuted_rows_undo_llama_cpp(num_heads):
    weights = np.arange(num_heads * 8 * 5).reshape(num_heads * 8, 5)
    stored = permute(weights, num_heads)
    np.testing.assert_array_equal(stored[unpermuted_rows(len(stored), num_heads)], weights)


def hub_weights(random):
    """Weights of a one-layer Llama by the names and shapes of transformers."""
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    weights = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": (261, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {k: random.standard_normal(v).astype(np.float32) for k, v in weights.items()}


def write_gguf(path, weights, *, pre="smollm", architecture="llama", extra=None):
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 258)
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {v: k for k, v in {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }.items()}  # fmt: skip
    for name, values in weights.items():
        if "q_proj" in name:
            values = permute(values, HEADS)  # noqa: PLW2901
        elif "k_proj" in name:
            values = permute(values, KV_HEADS)  # noqa: PLW2901
        if name.startswith("model.layers.0."):
            part = name.removeprefix("model.layers.0.").removesuffix(".weight")
            writer.add_tensor(f"blk.0.{names[part]}.weight", np.ascontiguousarray(values))
        elif "embed" in name:
            writer.add_tensor("token_embd.weight", values)
        else:
            writer.add_tensor("output_norm.weight", values)
    for name in extra or []:
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights():
    return hub_weights(np.random.default_rng(0))


def test_tiny_llama_survives_the_way_through_gguf(tmp_path, weights):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    path = write_gguf(tmp_path / "tiny.gguf", weights)
    (tmp_path / "out").mkdir()
    convert_gguf_llama(path, tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(loaded) == sorted(weights)
    for name, values in weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(values).to(torch.bfloat16)), name


def test_config_says_what_the_metadata_says(tmp_path, weights):
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    (tmp_path / "out").mkdir()
    convert_gguf_llama(path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["vocab_size"], config["head_dim"]) == (261, HEAD_DIM)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_splits_digits_before_its_merges(tmp_path, weights):
    tokenizers = pytest.importorskip("tokenizers")
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    convert_gguf_llama(path, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("ab12<|im_end|>")
    assert encoded.tokens == ["ab", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "ab12<|im_end|>"
    assert tokenizer.decode(encoded.ids) == "ab12"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre": "llama3"}, "pre-tokenizer `llama3`"),
        ({"architecture": "gemma"}, "architecture `gemma`"),
        ({"extra": ["output.weight"]}, r"`output\.weight`"),
    ],
)
def test_other_kinds_of_gguf_are_refused(tmp_path, weights, arguments, message):
    path = write_gguf(tmp_path / "tiny.gguf", weights, **arguments)
    with pytest.raises(FetchError, match=message):
        convert_gguf_llama(path, tmp_path)


def test_missing_tensor_is_named(tmp_path, weights):
    del weights["model.norm.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    with pytest.raises(FetchError, match=r"the first is `model\.norm\.weight`"):
        convert_gguf_llama(path, tmp_path)
