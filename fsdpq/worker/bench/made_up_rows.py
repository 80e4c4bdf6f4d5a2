"""Made-up rows of English-like words, and the tokenizer directory that they are prepared with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"alpaca": "prompt_completion", "chat": "messages"}
"""Kinds of rows -> ``data.format``: a prompt and a completion; two to ten turns."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def make_model(directory: Path, source: Path, *, chat: bool) -> None:
    """Writes the tokenizer of ``source`` and a config, with ChatML that marks what carries loss."""
    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if chat:
        (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def make_rows(path: Path, kind: str, count: int, tokenizer: Path) -> None:
    """Writes ``count`` rows of words from the vocabulary, frequent ones often.

    Lengths are log-normal.

    Args:
        path: of the JSON lines.
        kind: of `KINDS`.
        count: of rows.
        tokenizer: a ``tokenizer.json`` of a byte-level BPE.
    """
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    words = [word[1:] for word in vocabulary if re.fullmatch("\u0120[a-z]{1,14}", word)]
    text = _Texts(words)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            if kind == "alpaca":
                row: Any = {"prompt": text.draw(12, 0.6), "completion": " " + text.draw(45, 0.9)}
            else:
                turns = [
                    {"role": role, "content": text.draw(median, 0.9)}
                    for _ in range(int(text.random.integers(1, 6)))
                    for role, median in (("user", 30), ("assistant", 90))
                ]
                row = {"messages": turns}
            file.write(json.dumps(row) + "\n")


class _Texts:
    """Draws texts, the same ones in every run."""

    def __init__(self, words: list[str]) -> None:
        self.random = np.random.default_rng(0)
        self._words = words
        self._ranks = self.random.zipf(1.3, size=4_000_000) % len(words)
        self._place = 0

    def draw(self, median: float, spread: float) -> str:
        """Returns one sentence; its number of words is log-normal."""
        length = int(min(2500, 1 + self.random.lognormal(np.log(median), spread)))
        fits = self._place + 2 * length < len(self._ranks)
        self._place = self._place + length if fits else 0
        ranks = self._ranks[self._place : self._place + length]
        return " ".join(self._words[rank] for rank in ranks).capitalize() + "."
