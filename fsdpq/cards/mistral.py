"""Cards of Mistral AI's models.

Numbers: the ``config.json`` of each repository on https://huggingface.co.
"""

from __future__ import annotations

from dataclasses import replace

from fsdpq.cards.card import ModelCard

_MISTRAL_V01 = ModelCard(
    "mistralai/Mistral-7B-v0.1", "mistral", 32, 4096, 14336, 32, 8, 128, 32000, 32768,
    sliding_window=4096, license="apache-2.0", aliases=("mistralai/Mistral-7B-Instruct-v0.1",),
)  # fmt: skip
_MIXTRAL_8X22B = ModelCard(
    "mistralai/Mixtral-8x22B-v0.1", "mixtral", 56, 6144, 16384, 48, 8, 128, 32000, 65536,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16384, license="apache-2.0",
)  # fmt: skip

MISTRAL_CARDS: tuple[ModelCard, ...] = (
    _MISTRAL_V01,
    replace(
        _MISTRAL_V01, name="mistralai/Mistral-7B-Instruct-v0.2", sliding_window=None, aliases=(),
    ),
    replace(
        _MISTRAL_V01, name="mistralai/Mistral-7B-v0.3", vocab_size=32768, sliding_window=None,
        aliases=("mistralai/Mistral-7B-Instruct-v0.3",),
    ),
    ModelCard(
        "mistralai/Mixtral-8x7B-v0.1", "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=14336, license="apache-2.0",
        aliases=("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    ),
    _MIXTRAL_8X22B,
    replace(
        _MIXTRAL_8X22B, name="mistralai/Mixtral-8x22B-Instruct-v0.1", vocab_size=32768,
    ),
)  # fmt: skip
"""In the order in which they came out."""
