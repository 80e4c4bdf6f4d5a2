"""What torchtune's component paths stand for: closed tables of words, nothing of it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

_PAIRS = "preference training is another program's job"


@dataclass(frozen=True)
class DatasetComponent:
    """What a dataset builder reads.

    Attributes:
        repository: of the hub; empty where its ``source`` says it.
        format: of its rows.
        columns: name in the format -> name in that repository.
        names: name in ``column_map`` -> name in the format.
        note: what differs.
    """

    repository: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    note: str = ""


_INSTRUCT = {"input": "prompt", "output": "completion"}
_ALPACA = {"instruction": "instruction", "input": "input", "output": "output"}
_CHAT = {"conversations": "messages", "messages": "messages", "tools": "tools"}

DATASETS: dict[str, DatasetComponent] = {
    "alpaca_dataset": DatasetComponent("tatsu-lab/alpaca", "alpaca", names=_ALPACA),
    "alpaca_cleaned_dataset": DatasetComponent("yahma/alpaca-cleaned", "alpaca", names=_ALPACA),
    "chat_dataset": DatasetComponent("", "messages", names=_CHAT),
    "instruct_dataset": DatasetComponent(
        "", "prompt_completion", {"prompt": "input", "completion": "output"}, _INSTRUCT
    ),
    "text_completion_dataset": DatasetComponent("", "text"),
    "wikitext_dataset": DatasetComponent(
        "EleutherAI/wikitext_document_level", "text", {"text": "page"}
    ),
    "slimorca_dataset": DatasetComponent("Open-Orca/SlimOrca-Dedup", "messages", names=_CHAT),
    "samsum_dataset": DatasetComponent(
        "Samsung/samsum",
        "prompt_completion",
        {"prompt": "dialogue", "completion": "summary"},
        _INSTRUCT,
        "the line that asks for a summary is left out",
    ),
    "grammar_dataset": DatasetComponent(
        "liweili/c4_200m",
        "prompt_completion",
        {"prompt": "input", "completion": "output"},
        _INSTRUCT,
        "the line that asks for a correction is left out",
    ),
    "cnn_dailymail_articles_dataset": DatasetComponent(
        "ccdv/cnn_dailymail", "text", {"text": "article"}
    ),
    "stack_exchange_paired_dataset": DatasetComponent(
        "lvwerra/stack-exchange-paired", "prompt_completion", note=_PAIRS
    ),
    "hh_rlhf_helpful_dataset": DatasetComponent(
        "RLHFlow/HH-RLHF-Helpful-standard", "prompt_completion", note=_PAIRS
    ),
    "preference_dataset": DatasetComponent("", "prompt_completion", note=_PAIRS),
}
"""Dataset builder -> what it reads."""

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
