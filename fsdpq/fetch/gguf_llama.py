"""Converts a Llama model from GGUF to a Hugging Face directory: bf16 safetensors and its config.

transformers reads GGUF itself (``gguf_file=``), but then refuses to save, and gets the tokenizer of
``tokenizer.ggml.pre = smollm`` wrong (see `fsdpq.fetch.gguf_tokenizer`). llama.cpp stores the rows
of q and k permuted for its own rotary embedding; this undoes it:
https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py (``permute``).
Only what the catalog names is converted: untied heads, biases or other architectures are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdpq.errors import FetchError
from fsdpq.fetch.bf16_safetensors import TensorPlan, write_bf16
from fsdpq.fetch.gguf_tokenizer import SpecialIds, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when the written files change."""

CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Elements dequantized at once; the embedding is the only tensor that is larger."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.([a-z_]+)\.weight")


@dataclass(frozen=True)
class LlamaShape:
    """What a GGUF's metadata says about the model; lengths in elements, ``eps`` and theta as is."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float


def convert_gguf_llama(gguf_path: Path, directory: Path) -> None:
    """Writes the model in ``gguf_path`` to ``directory``, ready for transformers.

    Memory: peak is about 3 times `CHUNK_ELEMENTS` float32 values; the GGUF is memory-mapped.

    Args:
        gguf_path: a GGUF of architecture ``llama`` with tied embeddings.
        directory: an existing directory; gets config.json, generation_config.json,
            model.safetensors, tokenizer.json and tokenizer_config.json.

    Raises:
        FetchError: the GGUF is not of the kind that this converter knows.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    shape = read_shape(fields)
    ids = SpecialIds.from_fields(fields)
    tensors = {_hub_name(tensor.name): tensor for tensor in reader.tensors}
    names = sorted(tensors)
    _check_names(names, shape)
    plans = [
        TensorPlan(name, tuple(int(n) for n in reversed(tensors[name].shape))) for name in names
    ]
    write_bf16(
        directory / "model.safetensors",
        plans,
        (rows for name in names for rows in _float_rows(name, tensors[name], shape)),
    )
    write_tokenizer(fields, ids, context_length=shape.context_length, directory=directory)
    _write_json(directory / "config.json", llama_config(shape, ids))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad},
    )


def read_shape(fields: dict[str, Any]) -> LlamaShape:
    """Returns the model's shape from GGUF metadata.

    Args:
        fields: metadata key -> plain value.

    Raises:
        FetchError: another architecture, or a key is missing.
    """
    if fields.get("general.architecture") != "llama":
        raise FetchError(
            f"cannot convert a GGUF of architecture `{fields.get('general.architecture')}`",
            hint="use a safetensors checkpoint of this model",
        )
    try:
        hidden = int(fields["llama.embedding_length"])
        heads = int(fields["llama.attention.head_count"])
        return LlamaShape(
            num_layers=int(fields["llama.block_count"]),
            hidden_size=hidden,
            intermediate_size=int(fields["llama.feed_forward_length"]),
            num_heads=heads,
            num_kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
            head_dim=int(fields.get("llama.rope.dimension_count", hidden // heads)),
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            context_length=int(fields["llama.context_length"]),
            rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=_short_float(fields["llama.attention.layer_norm_rms_epsilon"]),
        )
    except KeyError as error:
        raise FetchError(
            f"the GGUF has no metadata `{error.args[0]}`",
            hint="use a safetensors checkpoint of this model",
        ) from error


def llama_config(shape: LlamaShape, ids: SpecialIds) -> dict[str, Any]:
    """Returns ``config.json`` in the form of transformers 5 (4.x reads ``rope_theta``)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "dtype": "bfloat16",
        "eos_token_id": ids.eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": round(shape.hidden_size**-0.5, 6),
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context_length,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": ids.pad,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def unpermuted_rows(num_rows: int, num_heads: int) -> npt.NDArray[np.intp]:
    """Returns which stored row is row ``i`` of the q or k projection that transformers expects.

    llama.cpp interleaves the two rotary halves of each head; transformers keeps them apart.

    Args:
        num_rows: rows of the projection, ``num_heads * head_dim``.
        num_heads: its number of heads (``num_kv_heads`` for k).

    Returns:
        intp ``(num_rows,)``.
    """
    import numpy as np

    stored: Any = np.arange(num_rows)
    stored = stored.reshape(num_heads, num_rows // num_heads // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _float_rows(name: str, tensor: Any, shape: LlamaShape) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the float32 values of one tensor, some rows at a time."""
    from gguf import dequantize

    data = tensor.data
    if name.endswith(".q_proj.weight"):
        data = data[unpermuted_rows(len(data), shape.num_heads)]
    elif name.endswith(".k_proj.weight"):
        data = data[unpermuted_rows(len(data), shape.num_kv_heads)]
    num_rows = max(1, CHUNK_ELEMENTS * len(data) // int(tensor.n_elements))
    for start in range(0, len(data), num_rows):
        yield dequantize(data[start : start + num_rows], tensor.tensor_type)


def _hub_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise FetchError(
            f"the GGUF holds a tensor `{name}` that this converter does not know",
            hint="use a safetensors checkpoint of this model",
        )
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _check_names(names: list[str], shape: LlamaShape) -> None:
    layers = {
        f"model.layers.{index}.{part}.weight"
        for index in range(shape.num_layers)
        for part in _LAYER_NAMES.values()
    }
    missing = sorted((layers | set(_GLOBAL_NAMES.values())) - set(names))
    if missing:
        raise FetchError(
            f"the GGUF misses {len(missing)} tensors, the first is `{missing[0]}`",
            hint="use a safetensors checkpoint of this model",
        )


def _short_float(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
