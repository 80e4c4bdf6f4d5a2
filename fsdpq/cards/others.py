"""Cards of models that have no large family here: Phi, Falcon, StableLM, OLMo, GPT-NeoX.

Numbers: the ``config.json`` of each repository on https://huggingface.co.
"""

from __future__ import annotations

from fsdpq.cards.card import ModelCard

OTHER_CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        "EleutherAI/gpt-neox-20b", "gpt_neox", 44, 6144, 24576, 64, 64, 96, 50432, 2048,
        license="apache-2.0",
    ),
    ModelCard(
        "tiiuae/falcon-7b", "falcon", 32, 4544, 18176, 71, 1, 64, 65024, 2048,
        tie_word_embeddings=True, license="apache-2.0", aliases=("tiiuae/falcon-7b-instruct",),
    ),
    ModelCard(
        "microsoft/phi-2", "phi", 32, 2560, 10240, 32, 32, 80, 51200, 2048, license="mit",
    ),
    ModelCard(
        "stabilityai/stablelm-2-1_6b", "stablelm", 24, 2048, 5632, 32, 32, 64, 100352, 4096,
        license="other",
    ),
    ModelCard(
        "microsoft/Phi-3-mini-4k-instruct", "phi3", 32, 3072, 8192, 32, 32, 96, 32064, 4096,
        sliding_window=2047, license="mit",
    ),
    ModelCard(
        "microsoft/Phi-3-medium-4k-instruct", "phi3", 40, 5120, 17920, 40, 10, 128, 32064, 4096,
        sliding_window=2047, license="mit",
    ),
    ModelCard(
        "microsoft/phi-4", "phi3", 40, 5120, 17920, 40, 10, 128, 100352, 16384, license="mit",
    ),
    ModelCard(
        "allenai/OLMo-2-1124-7B", "olmo2", 32, 4096, 11008, 32, 32, 128, 100352, 4096,
        license="apache-2.0", aliases=("allenai/OLMo-2-1124-7B-Instruct",),
    ),
)  # fmt: skip
"""In the order in which they came out."""
