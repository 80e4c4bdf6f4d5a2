"""Cards of Google's Gemma models.

Numbers: the ``config.json`` of each repository on https://huggingface.co.
"""

from __future__ import annotations

from fsdpq.cards.card import ModelCard

GEMMA_CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        "google/gemma-2b", "gemma", 18, 2048, 16384, 8, 1, 256, 256000, 8192,
        tie_word_embeddings=True, license="gemma", aliases=("google/gemma-2b-it",),
    ),
    ModelCard(
        "google/gemma-7b", "gemma", 28, 3072, 24576, 16, 16, 256, 256000, 8192,
        tie_word_embeddings=True, license="gemma", aliases=("google/gemma-7b-it",),
    ),
    ModelCard(
        "google/gemma-2-2b", "gemma2", 26, 2304, 9216, 8, 4, 256, 256000, 8192,
        tie_word_embeddings=True, sliding_window=4096, license="gemma",
        aliases=("google/gemma-2-2b-it",),
    ),
    ModelCard(
        "google/gemma-2-9b", "gemma2", 42, 3584, 14336, 16, 8, 256, 256000, 8192,
        tie_word_embeddings=True, sliding_window=4096, license="gemma",
        aliases=("google/gemma-2-9b-it",),
    ),
    ModelCard(
        "google/gemma-2-27b", "gemma2", 46, 4608, 36864, 32, 16, 128, 256000, 8192,
        tie_word_embeddings=True, sliding_window=4096, license="gemma",
        aliases=("google/gemma-2-27b-it",),
    ),
    ModelCard(
        "google/gemma-3-1b-pt", "gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, 32768,
        tie_word_embeddings=True, sliding_window=512, license="gemma",
        aliases=("google/gemma-3-1b-it",),
    ),
)  # fmt: skip
"""In the order in which they came out."""
