"""What can be told from a row's content alone: empty fields, roles out of order, its fingerprint.

None of it is a mistake that stops a run: rows of their format that may still not be what they
should be.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsdpq.rows.formats import FORMATS, GUANACO_ASSISTANT, GUANACO_HUMAN
from fsdpq.rows.messages import is_conversation, read_conversation

Row = Mapping[str, Any]
Message = dict[str, Any]

_GUANACO_TURN = re.compile(f"({GUANACO_HUMAN}|{GUANACO_ASSISTANT})")


def fingerprint(row: Row) -> int:
    """Returns 64 bits that are equal for rows that say the same.

    Text is taken in Unicode's composed form, with every run of white space as one space and none at
    its ends. Two different rows share a fingerprint with a chance of 3e-6 among ten million.
    """
    text = json.dumps(_normalized(row), ensure_ascii=True, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def find_empty(row: Row, format_name: str, messages: Sequence[Message]) -> list[str]:
    """Returns the parts of a row that hold no text: columns, or roles' messages.

    Args:
        row: of its format.
        format_name: its format.
        messages: those of `conversation`.
    """
    if messages:
        empty = [f"{each['role']} message" for each in messages if not _holds_something(each)]
        return list(dict.fromkeys(empty))
    return [
        name
        for name in FORMATS[format_name].columns
        if isinstance(row.get(name), str) and not row[name].strip()
    ]


def find_role_mistakes(messages: Sequence[Message]) -> list[str]:
    """Returns what is unusual in the order of a conversation's roles, each once."""
    roles = [str(message["role"]) for message in messages]
    return list(dict.fromkeys(_role_mistakes(roles))) if roles else []


def conversation(row: Row, format_name: str) -> list[Message]:
    """Returns the messages of a conversation, none where the row is none."""
    if is_conversation(row, format_name):
        return read_conversation(row).messages
    if format_name != "guanaco":
        return []
    _, *parts = _GUANACO_TURN.split(row["text"])
    roles = {GUANACO_HUMAN: "user", GUANACO_ASSISTANT: "assistant"}
    return [
        {"role": roles[mark], "content": content}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def texts_of(value: Any) -> Iterator[str]:
    """Yields every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def _role_mistakes(roles: list[str]) -> Iterator[str]:
    spoken = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        yield "a system message after the first message"
    if not spoken:
        yield "a system message only"
        return
    if spoken[0] != "user":
        yield f"the conversation begins with {_article(spoken[0])} message"
    for before, role in itertools.pairwise(spoken):
        if role == before and role != "tool":
            yield f"two {role} messages in a row"
        if role == "tool" and before not in ("assistant", "tool"):
            yield f"a tool message after {_article(before)} message"
    if "assistant" not in spoken:
        yield "no assistant message"
    elif spoken[-1] != "assistant":
        yield f"the conversation ends with {_article(spoken[-1])} message"


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeio" else f"a {role}"


def _holds_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _normalized(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {str(key): _normalized(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_normalized(item) for item in value]
    return value
