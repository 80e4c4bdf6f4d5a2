"""What is trained under blows: a tiny random model, made-up rows, and recipes of many sorts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STEPS = 24
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"name_or_path": "model", "dtype": "fp32"},
    "quantization": {"kind": "bnb"},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0},
    "data": {"path": "rows.jsonl", "seq_len": 64, "eval_fraction": 0.1},
    "optimizer": {"kind": "adamw", "lr": 5e-3},
    "lr_scheduler": {"kind": "cosine", "warmup_steps": 3},
    "training": {
        "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3,
        "eval_interval": 7,
    },
    "checkpoint": {"interval": 1, "resume": "auto"},
    "launch": {"nproc_per_node": 2, "device": "cpu"},
}  # fmt: skip
"""Two ranks, two micro-batches a step, a checkpoint after every step: a write is nearly always
under way."""

HQQ = {"kind": "hqq", "group_size": 64}
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Configuration:
    """A sort of run.

    Attributes:
        name: for the table.
        sections: what differs from `RECIPE`; a section that names its kind is replaced.
        worlds: ranks that the run may go on with, by turns; one number is always the same.
    """

    name: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    worlds: tuple[int, ...] = (2,)

    def recipe(self) -> dict[str, Any]:
        """Returns the whole recipe as plain data."""
        document: dict[str, Any] = {**RECIPE, "name": self.name}
        for section, changes in self.sections.items():
            switches = "kind" in changes
            document[section] = changes if switches else document.get(section, {}) | changes
        return document


CONFIGURATIONS = (
    Configuration(
        "lora-nf4-packed-dropout",
        {
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.1},
            "data": {"packing": "best_fit"},
        },
    ),
    Configuration("dora-hqq", {"adapter": {"kind": "dora", "rank": 4}, "quantization": HQQ}),
    Configuration(
        "llama-pro",
        {
            "adapter": {"kind": "llama_pro", "num_new_layers": 2},
            "quantization": {"kind": "none"},
            "metrics": {"log_interval": 3},
        },
    ),
    Configuration("fp16-scaler", {"fsdp": {"precision": "fp16_autocast"}}),
    Configuration("adamw-8bit", {"optimizer": {"kind": "adamw_8bit", "lr": 5e-3}}),
    Configuration("muon", {"optimizer": {"kind": "muon", "lr": 5e-3}}),
    Configuration("offload-cpu", {"fsdp": {"offload": "cpu"}, "launch": {"max_restarts": 2}}),
    Configuration("offload-disk", {"fsdp": {"offload": "disk"}}),
    Configuration(
        "full-finetuning",
        {
            "adapter": {"kind": "none"},
            "quantization": {"kind": "none"},
            "optimizer": {"kind": "sgd", "lr": 5e-3, "momentum": 0.9},
        },
    ),
    Configuration(
        "streamed-keep-best",
        {
            "data": {"streaming": True, "eval_fraction": 0.0, "eval": {"path": "held-out.jsonl"}},
            "checkpoint": {"keep_best": True, "keep_last": 1},
        },
    ),
    Configuration("other-world-sizes", worlds=(2, 1, 4)),
)
"""All that the long campaign goes through, by turns."""


def write_project(folder: Path) -> Path:
    """Writes ``model/``, ``rows.jsonl`` and ``held-out.jsonl`` into a folder, and returns it.

    One that is there stays.
    """
    if (folder / "model" / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("rows.jsonl", 64), ("held-out.jsonl", 8)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for index in range(count):
                file.write(json.dumps(_row(index)) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(_row(index)) for index in range(8)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    set_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    return folder


def write_recipe(folder: Path, configuration: Configuration) -> Path:
    """Writes the recipe of a configuration beside the model."""
    path = folder / f"{configuration.name}.yaml"
    text = yaml.safe_dump(configuration.recipe(), sort_keys=False)
    if not path.exists():  # another run of it may be reading
        path.write_text(text, encoding="utf-8")
    return path


def _row(index: int) -> dict[str, Any]:
    word = WORDS[index % len(WORDS)]
    question = f"What is {word}? " + "Tell me. " * (index % 5) + str(index)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": word * 2}]
    return {"messages": messages}
