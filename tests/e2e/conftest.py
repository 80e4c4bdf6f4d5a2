"""A folder as a user has it: a small model with a tokenizer, rows, a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run
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


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe.yaml``, ``model/`` and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("project")
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


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the commands: no colours, and a cache where data is prepared once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"}


@pytest.fixture
def fsdpq(project: Path, environment: dict[str, str]) -> Run:
    """Runs the command line in the project's folder."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fsdpq", *arguments],
            cwd=project, env=environment, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip

    return run
