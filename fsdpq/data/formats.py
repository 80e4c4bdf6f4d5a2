"""Reads rows of a data file and checks their shape before any weight is loaded.

The one format so far is ``messages``: a JSON object a line, ``{"messages": [{"role": ...,
"content": ...}, ...]}``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdpq.errors import Location, Problem, RecipeError

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Conversation = list[Message]


def read_conversations(path: Path) -> list[Conversation]:
    """Returns the conversations of a JSON-lines file, in order.

    Raises:
        RecipeError: every bad line at once, each with its number; also when nothing is left.
    """
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            message = _mistake(line)
            if message:
                location = Location(str(path), number, 1, line.rstrip("\n")[:160])
                problems.append(Problem(message, "data.path", location, HINT))
            else:
                conversations.append(_plain(json.loads(line)))
    if not conversations and not problems:
        problems.append(Problem(f"{path} has no rows", "data.path", None, HINT))
    if problems:
        raise RecipeError(problems[:20])
    return conversations


HINT = 'a row reads {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


def _mistake(line: str) -> str:
    """Returns what is wrong with a line, empty when nothing is."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    if not isinstance(row, dict) or "messages" not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        return f"no `messages` in this row (it has: {keys})"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list of messages"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"message {index + 1} has no text in `content`"
        if message.get("role") not in ROLES:
            return f"message {index + 1} has the role `{message.get('role')}`, not {ROLES}"
    return ""


def _plain(row: dict[str, Any]) -> Conversation:
    return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
