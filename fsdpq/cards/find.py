"""Looks a model up: by its name in the table, or by the ``config.json`` of a local directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fsdpq.cards.card import ModelCard
from fsdpq.cards.families import FAMILIES
from fsdpq.cards.gemma import GEMMA_CARDS
from fsdpq.cards.llama import LLAMA_CARDS
from fsdpq.cards.mistral import MISTRAL_CARDS
from fsdpq.cards.others import OTHER_CARDS
from fsdpq.cards.qwen import QWEN_CARDS

CARDS: tuple[ModelCard, ...] = (
    *LLAMA_CARDS,
    *MISTRAL_CARDS,
    *QWEN_CARDS,
    *GEMMA_CARDS,
    *OTHER_CARDS,
)
"""Every model that is known without its files."""

_BY_NAME = {name.lower(): card for card in CARDS for name in (card.name, *card.aliases)}

_OTHER_WORDS = {"num_kv_heads": "num_key_value_heads", "ffn_hidden_size": "intermediate_size"}
"""What Falcon's config.json calls them -> what the others call them."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    "gemma2": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "gemma3_text": {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "falcon": {"tie_word_embeddings": True, "max_position_embeddings": 2048},
    "phi": {"max_position_embeddings": 2048},
    "gpt_neox": {"max_position_embeddings": 2048},
}
"""transformers' defaults, by model type, for what a config.json may leave out."""


def find_card(name_or_path: str) -> ModelCard | None:
    """Returns the card of a hub repository or ``pypi:`` name, None where the table has none.

    The hub takes names in any case, and so does this.
    """
    return _BY_NAME.get(name_or_path.lower())


def card_from_config(path: Path) -> ModelCard | None:
    """Returns the card of the ``config.json`` at ``path`` (or in the directory ``path``).

    None where there is no such file, or where its architecture is none that this package knows.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return card_of_config(str(path), cast("Any", config)) if isinstance(config, dict) else None


def card_of_config(name: str, config: Mapping[str, Any]) -> ModelCard | None:
    """Returns the card of what a ``config.json`` says.

    None where its architecture is none that this package knows, or where a size is missing.

    Args:
        name: of the model.
        config: the file's table.
    """
    if str(config.get("model_type")) not in FAMILIES:
        return None
    renamed = {_OTHER_WORDS.get(key, key): value for key, value in config.items()}
    facts = {**_DEFAULTS.get(str(config["model_type"]), {}), **renamed}
    try:
        return _card_of(name, facts)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _card_of(name: str, config: dict[str, Any]) -> ModelCard:
    """Returns the card of a config.json's facts.

    Raises:
        KeyError: a size is missing, or an option of the architecture is none that is known.
        TypeError: a size is no whole number.
    """
    model_type = str(config["model_type"])
    if model_type == "falcon":
        config = _plain_falcon(config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    num_experts = config.get("num_experts") or config.get("num_local_experts") or 0
    uses_window = config.get("use_sliding_window", True) and config.get("sliding_window")
    return ModelCard(
        name=name,
        model_type=model_type,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", hidden // heads),
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_size(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_experts=num_experts,
        num_experts_per_tok=_size(config, "num_experts_per_tok") if num_experts else 0,
        moe_intermediate_size=(
            _size(config, "moe_intermediate_size", _size(config, "intermediate_size"))
            if num_experts
            else 0
        ),
        sliding_window=_size(config, "sliding_window") if uses_window else None,
    )


def _plain_falcon(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a Falcon whose heads share one key and value, as Falcon-7B's do."""
    if config.get("new_decoder_architecture") or not config.get("multi_query", True):
        raise KeyError("multi_query")
    return {
        "intermediate_size": 4 * _size(config, "hidden_size"),
        **config,
        "num_key_value_heads": 1,
    }


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """Returns a positive whole number; ``default`` where it is left out or null."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(config[name], int) or config[name] < 1:
        raise TypeError(name)
    return config[name]
