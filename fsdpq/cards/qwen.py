"""Cards of Alibaba's Qwen models.

Numbers: the ``config.json`` of each repository on https://huggingface.co. Qwen2.5's instruction
models and Qwen3's base models have a shorter ``max_position_embeddings`` than their counterparts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fsdpq.cards.card import ModelCard


def _qwen25(size: str, *shape: int, tied: bool = False, **facts: str) -> Iterator[ModelCard]:
    """Yields the card of a Qwen2.5 base model and that of its instruction model."""
    layers, hidden, ffn, heads, kv_heads, vocab, context = shape
    card = ModelCard(
        f"Qwen/Qwen2.5-{size}", "qwen2", layers, hidden, ffn, heads, kv_heads, hidden // heads,
        vocab, context, tie_word_embeddings=tied, license=facts.get("license", "apache-2.0"),
    )  # fmt: skip
    yield card
    yield replace(card, name=f"{card.name}-Instruct", max_position_embeddings=32768)


def _qwen3(size: str, *shape: int, tied: bool = False) -> Iterator[ModelCard]:
    """Yields the card of a Qwen3 model and that of its base model."""
    layers, hidden, ffn, heads, kv_heads = shape
    card = ModelCard(
        f"Qwen/Qwen3-{size}", "qwen3", layers, hidden, ffn, heads, kv_heads, 128, 151936, 40960,
        tie_word_embeddings=tied, license="apache-2.0",
    )  # fmt: skip
    yield card
    if size != "32B":
        yield replace(card, name=f"{card.name}-Base", max_position_embeddings=32768)


_QWEN3_30B = ModelCard(
    "Qwen/Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, 40960,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, license="apache-2.0",
)  # fmt: skip

QWEN_CARDS: tuple[ModelCard, ...] = (
    *_qwen25("0.5B", 24, 896, 4864, 14, 2, 151936, 32768, tied=True),
    *_qwen25("1.5B", 28, 1536, 8960, 12, 2, 151936, 131072, tied=True),
    *_qwen25("3B", 36, 2048, 11008, 16, 2, 151936, 32768, tied=True, license="qwen-research"),
    *_qwen25("7B", 28, 3584, 18944, 28, 4, 152064, 131072),
    *_qwen25("14B", 48, 5120, 13824, 40, 8, 152064, 131072),
    *_qwen25("32B", 64, 5120, 27648, 40, 8, 152064, 131072),
    *_qwen25("72B", 80, 8192, 29568, 64, 8, 152064, 131072, license="qwen"),
    *_qwen3("0.6B", 28, 1024, 3072, 16, 8, tied=True),
    *_qwen3("1.7B", 28, 2048, 6144, 16, 8, tied=True),
    *_qwen3("4B", 36, 2560, 9728, 32, 8, tied=True),
    *_qwen3("8B", 36, 4096, 12288, 32, 8),
    *_qwen3("14B", 40, 5120, 17408, 40, 8),
    *_qwen3("32B", 64, 5120, 25600, 64, 8),
    _QWEN3_30B,
)
"""In the order in which they came out."""
