"""Reads sizes from a ``config.json`` of any family: each has words of its own for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

WORDS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": (
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ff_dim", "d_ff",
    ),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_heads"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
    ),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k",
    ),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_intermediate_size"),
}  # fmt: skip
"""What this package calls a size -> what config files call it, most common first."""

TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Where configs of models that also see or hear keep those of their language model."""


def read_config(directory: Path) -> dict[str, Any]:
    """Returns ``config.json`` of ``directory``; empty where it cannot be read."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that is about the language model."""
    for part in TEXT_PARTS:
        found = config.get(part)
        if isinstance(found, dict):
            return {**config, **cast("dict[str, Any]", found)}
    return dict(config)


def size_of(config: Mapping[str, Any], name: str) -> int | None:
    """Returns the positive whole number that a config calls ``name`` or its like, or None."""
    for word in WORDS[name]:
        value = config.get(word)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def attention_sizes(text: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Returns the sizes of attention as fields of `fsdpq.plan.shape.ModelShape`.

    Args:
        text: the part of a config that is about the language model.
        hidden_size: for a config that does not say it.
    """
    hidden = size_of(text, "hidden_size") or hidden_size
    heads = size_of(text, "num_attention_heads") or 1
    return {
        "hidden_size": hidden,
        "intermediate_size": size_of(text, "intermediate_size") or 0,
        "num_attention_heads": heads,
        "num_key_value_heads": size_of(text, "num_key_value_heads") or heads,
        "head_dim": size_of(text, "head_dim") or hidden // heads,
        "max_position_embeddings": size_of(text, "max_position_embeddings") or 0,
    }
