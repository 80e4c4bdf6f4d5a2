"""Converts the chatterbot corpus (YAML lists of turns) to JSON lines of chat messages.

https://github.com/gunthercox/chatterbot-corpus. The files repeat themselves (``tech_support.yml``
holds ten pairs a thousand times) and write answers like ``1984`` or ``yes`` without quotes, so
scalars are read as the text that was written. One row of ``trivia.yml`` lost its second dash and
is therefore a single text without an answer: such rows are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when the written rows change."""


def convert_chatterbot(sources: Iterable[Path], target: Path) -> int:
    """Writes every dialogue in ``sources`` to ``target`` once, in the order of first appearance.

    Args:
        sources: YAML files of the corpus.
        target: the JSON-lines file to write: ``{"messages": [{"role", "content"}, ...]}``, roles
            alternate and the last is ``assistant``.

    Returns:
        The number of rows.
    """
    seen: set[tuple[str, ...]] = set()
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for source in sources:
            for turns in read_dialogues(source):
                identity = tuple(" ".join(turn.split()) for turn in turns)
                if identity in seen:
                    continue
                seen.add(identity)
                file.write(json.dumps({"messages": to_messages(turns)}, ensure_ascii=False) + "\n")
    return len(seen)


def read_dialogues(source: Path) -> Iterator[list[str]]:
    """Yields the dialogues of one corpus file, each an even number of non-empty turns."""
    import yaml

    text = source.read_text(encoding="utf-8")
    # BaseLoader builds nothing but text, lists and dicts: safe, and scalars stay as written.
    content: Any = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
    rows: list[Any] = content["conversations"]
    for row in rows:
        if isinstance(row, str):
            continue
        turns = [str(turn).strip() for turn in row]
        complete = turns[: len(turns) // 2 * 2]
        if complete and all(complete):
            yield complete


def to_messages(turns: list[str]) -> list[dict[str, str]]:
    """Returns ``turns`` as messages, the user first."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": turn}
        for index, turn in enumerate(turns)
    ]
