"""What the decoder layers of each architecture are made of, by transformers' ``model_type``.

Read in ``transformers/models/<model_type>/modeling_<model_type>.py`` of transformers 5.23; a test
builds one model of every type on the meta device and compares names, shapes and counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What one architecture's weights are, apart from their sizes.

    Attributes:
        projections: names of the attention's input projections: three, or one that is fused.
        output: name of the attention's output projection.
        gates: names of the feed-forward's input projections: gate and up, one that is both, or one.
        down: name of the feed-forward's output projection.
        gated: the feed-forward multiplies a gate and an up projection.
        projection_bias: the attention's input projections have a bias.
        other_bias: so have all other linear layers of a decoder layer.
        head_bias: so has the output head.
        layer_norms: norms over the hidden size in a decoder layer.
        norm_bias: norms have a bias.
        qk_norm: norms of query and key: none, over each head, or over all heads at once.
        experts: the feed-forward is a router and experts (3-D parameters in transformers 5).
        lacks_attention: values of ``attn_implementation`` that transformers refuses for it.
        isolates_documents: its masks read position ids, so packed documents do not see each other;
            others are given their masks, with ``sdpa`` and ``eager``.
        has_liger_kernels: liger-kernel 0.8.5 has kernels for it.
    """

    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    projection_bias: bool = False
    other_bias: bool = False
    head_bias: bool = False
    layer_norms: int = 2
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    experts: bool = False
    lacks_attention: tuple[str, ...] = ()
    isolates_documents: bool = True
    has_liger_kernels: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(experts=True),
    "qwen2": Family(projection_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head", experts=True),
    "gemma": Family(),
    "gemma2": Family(layer_norms=4, lacks_attention=("sdpa",)),
    "gemma3_text": Family(layer_norms=4, qk_norm="head"),
    "olmo2": Family(qk_norm="full"),
    "stablelm": Family(
        projection_bias=True,
        norm_bias=True,
        lacks_attention=("flex_attention",),
        has_liger_kernels=False,
    ),
    "phi": Family(
        output="self_attn.dense",
        gates=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
        projection_bias=True,
        other_bias=True,
        head_bias=True,
        layer_norms=1,
        norm_bias=True,
        has_liger_kernels=False,
    ),
    "phi3": Family(projections=("self_attn.qkv_proj",), gates=("mlp.gate_up_proj",)),
    "falcon": Family(
        projections=("self_attention.query_key_value",),
        output="self_attention.dense",
        gates=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        gated=False,
        layer_norms=1,
        norm_bias=True,
        lacks_attention=("flex_attention",),
        isolates_documents=False,
        has_liger_kernels=False,
    ),
    "gpt_neox": Family(
        projections=("attention.query_key_value",),
        output="attention.dense",
        gates=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        gated=False,
        projection_bias=True,
        other_bias=True,
        norm_bias=True,
        has_liger_kernels=False,
    ),
}
"""transformers' ``model_type`` -> its family."""
