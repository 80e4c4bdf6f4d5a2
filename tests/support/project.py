"""A folder as a user has it: a small model with a tokenizer, rows, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from support.tiny import save_tiny_llama
from support.tokenizer import save_tokenizer

RECIPE = """\
version: 1
name: tiny
model: {name_or_path: model, dtype: fp32}
quantization: {kind: bnb}
adapter: {kind: lora, rank: 8, alpha: 16}
data: {path: rows.jsonl, seq_len: 64, eval_fraction: 0.25}
optimizer: {kind: adamw, lr: 1e-2}
lr_scheduler: {kind: constant}
training: {steps: 24, global_batch_size: 8, micro_batch_size: 4, seed: 3}
metrics: {sample_prompts: ["What is one?"], sample_max_new_tokens: 8}
launch: {nproc_per_node: 2, device: cpu}
"""
TERSE = """\
{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<|endoftext|>{% endfor %}
{% if add_generation_prompt %}a: {% endif %}
"""


def save_project(folder: Path) -> Path:
    """Writes ``recipe.yaml``, ``model/``, ``rows.jsonl`` and ``terse.jinja`` into a folder."""
    save_tokenizer(save_tiny_llama(folder / "model"))
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(32):
            word = words[index % len(words)]
            messages = [
                {"role": "user", "content": f"What is {word}? {index}"},
                {"role": "assistant", "content": f"{word} is {word}"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "terse.jinja").write_text(TERSE)
    return folder
