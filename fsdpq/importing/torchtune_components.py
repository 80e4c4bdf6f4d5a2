"""What torchtune's component paths stand for: closed tables of words, nothing of it is imported."""

from __future__ import annotations

from typing import Any

from fsdpq.importing.optimizers import STATES_DIFFER

MODELS = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "code_llama2_7b": "codellama/CodeLlama-7b-hf",
    "code_llama2_13b": "codellama/CodeLlama-13b-hf",
    "code_llama2_70b": "codellama/CodeLlama-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_1_70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama3_1_405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3_3_70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "gemma_2b": "google/gemma-2b",
    "gemma_7b": "google/gemma-7b",
    "gemma2_2b": "google/gemma-2-2b",
    "gemma2_9b": "google/gemma-2-9b",
    "gemma2_27b": "google/gemma-2-27b",
    "phi3_mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi4_14b": "microsoft/phi-4",
    "qwen2_0_5b": "Qwen/Qwen2-0.5B-Instruct",
    "qwen2_1_5b": "Qwen/Qwen2-1.5B-Instruct",
    "qwen2_7b": "Qwen/Qwen2-7B-Instruct",
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5_1_5b_base": "Qwen/Qwen2.5-1.5B",
    "qwen2_5_1_5b_instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_5_3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2_5_7b_base": "Qwen/Qwen2.5-7B",
    "qwen2_5_7b_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2_5_14b_base": "Qwen/Qwen2.5-14B",
    "qwen2_5_14b_instruct": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2_5_32b_base": "Qwen/Qwen2.5-32B",
    "qwen2_5_32b_instruct": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2_5_72b_base": "Qwen/Qwen2.5-72B",
    "qwen2_5_72b_instruct": "Qwen/Qwen2.5-72B-Instruct",
}
"""Model builder, without ``lora_`` or ``qlora_`` -> the repository that its configs download."""

_SHAREGPT = "its rows have `conversations`: write them as `messages` with `role` and `content`"
_INSTRUCT = "the rows must have `prompt` and `completion`"
_PAIRS = "preference training is another program's job"

DATASETS: dict[str, tuple[str, str, str]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", ""),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", ""),
    "chat_dataset": ("", "messages", "the rows must have `messages` with `role` and `content`"),
    "instruct_dataset": ("", "prompt_completion", _INSTRUCT),
    "text_completion_dataset": ("", "text", ""),
    "wikitext_dataset": (
        "EleutherAI/wikitext_document_level",
        "text",
        "its column is `page`: rename it to `text`",
    ),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "messages", _SHAREGPT),
    "samsum_dataset": ("Samsung/samsum", "prompt_completion", _INSTRUCT),
    "grammar_dataset": ("liweili/c4_200m", "prompt_completion", _INSTRUCT),
    "cnn_dailymail_articles_dataset": (
        "ccdv/cnn_dailymail",
        "text",
        "its column is `article`: rename it to `text`",
    ),
    "stack_exchange_paired_dataset": ("lvwerra/stack-exchange-paired", "prompt_completion", _PAIRS),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", "prompt_completion", _PAIRS),
    "preference_dataset": ("", "prompt_completion", _PAIRS),
}
"""Dataset builder -> repository (empty: its ``source`` says it), format, what differs."""

TEXT_DATASETS = ("text_completion_dataset", "wikitext_dataset", "cnn_dailymail_articles_dataset")
"""Datasets of plain text, of which every token is trained on."""


OPTIMIZERS: dict[str, Any] = {
    "torch.optim.adamw": "adamw",
    "torch.optim.adam": "adam",
    "torch.optim.sgd": "sgd",
    "torch.optim.adadelta": "adadelta",
    "bitsandbytes.optim.pagedadamw": ("adamw", STATES_DIFFER.format("pageable memory")),
    "bitsandbytes.optim.pagedadamw8bit": ("adamw_8bit", STATES_DIFFER.format("pageable memory")),
    "bitsandbytes.optim.adamw8bit": "adamw_8bit",
    "torchao.prototype.low_bit_optim.adamw8bit": "adamw_8bit",
}
"""Optimizer class, in lower case -> kind."""
