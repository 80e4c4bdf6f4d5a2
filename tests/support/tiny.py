"""A tiny random Llama, its recipe and made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.data.text.tokenize import Row
from fsdpq.recipe.root import Recipe

VOCAB_SIZE = 331


def save_tiny_llama(
    directory: Path, *, tied: bool = True, seed: int = 0, family: str = "llama", **changes: Any
) -> Path:
    """Saves an fp32 Llama (or another family) of 3 layers.

    Hidden 192 is three blocks of 64, an odd number.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(options | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # zeros would hide a bias that is lost
    model.save_pretrained(directory)
    return directory


def tiny_recipe(**sections: dict[str, Any]) -> Recipe:
    """Returns a recipe in fp32 with NF4, double quantization and LoRA on every linear."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"name_or_path": "tiny", "dtype": "fp32"},
        "quantization": {"kind": "bnb"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
        "data": {"path": "rows.jsonl"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "lr_scheduler": {"kind": "constant"},
        "training": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7},
        "launch": {"device": "cpu", "nproc_per_node": 2},
    }
    for section, changes in sections.items():
        switches_kind = "kind" in changes and section in document
        document[section] = changes if switches_kind else document.get(section, {}) | changes
    return Recipe.model_validate(document)


def random_rows(num_rows: int, *, seed: int = 1, shortest: int = 6, longest: int = 24) -> list[Row]:
    """Returns rows of uneven length whose trained share is uneven too."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for index in range(num_rows):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        prompt = 1 + index % (length - 2)
        rows.append(Row(ids, [False] * prompt + [True] * (length - prompt)))
    return rows
