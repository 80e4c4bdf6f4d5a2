"""The plain texts of the formats, for base models without a chat template.

The prompts are those of Stanford Alpaca and of fsdp_qlora; conversations get guanaco's marks, and
every answer the tokenizer's end-of-text token, so that the model learns to stop at each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fsdpq.data.templates.jinja_text import Message, TemplateError
from fsdpq.data.templates.marks import Turn
from fsdpq.data.templates.turns import content_of
from fsdpq.rows.formats import GUANACO_ASSISTANT, GUANACO_HUMAN

Row = Mapping[str, Any]

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""https://github.com/tatsu-lab/stanford_alpaca#data-release"""

QNA = "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n"
QNA_NO_CONTEXT = "###Question:\n{question}\n###Answer:\n"
"""https://github.com/AnswerDotAI/fsdp_qlora"""

ANSWERS = {
    "prompt_completion": "completion", "alpaca": "output", "qna": "answer", "qna_no_ctx": "answer",
}  # fmt: skip
"""Formats of one prompt and one answer -> the answer's column."""

TURN_FORMATS = ("messages", "guanaco")
"""Formats whose plain text has turns."""

_ROLES = {
    "system": "### System:", "user": GUANACO_HUMAN, "assistant": GUANACO_ASSISTANT,
    "tool": "### Tool:",
}  # fmt: skip
_GUANACO_TURN = re.compile(f"({GUANACO_HUMAN}|{GUANACO_ASSISTANT})")


def prompt_text(row: Row, format_name: str) -> str:
    """Returns the text before the answer of a row of one prompt and one answer."""
    if format_name == "alpaca":
        return (ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT).format_map(row)
    templates = {"qna": QNA, "qna_no_ctx": QNA_NO_CONTEXT}
    return templates.get(format_name, "{prompt}").format_map(row)


def message_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Returns role and text of messages, a space before each.

    Raises:
        TemplateError: a message calls a tool.
    """
    for number, message in enumerate(messages, start=1):
        if message.get("tool_calls"):
            raise TemplateError(
                f"message {number} calls a tool, and there is no chat template to show it"
            )
    return [(message["role"], f" {content_of(message)}") for message in messages]


def guanaco_turns(text: str) -> list[tuple[str, str]]:
    """Returns role and text of the turns, white space kept."""
    _, *parts = _GUANACO_TURN.split(text)
    roles = {GUANACO_HUMAN: "user", GUANACO_ASSISTANT: "assistant"}
    return [(roles[mark], turn) for mark, turn in zip(parts[::2], parts[1::2], strict=True)]


def join_turns(turns: Sequence[tuple[str, str]], eos_token: str) -> tuple[str, dict[int, Turn]]:
    """Returns turns in guanaco's marks as one text, and where each is.

    An answer begins right after its mark, with its space: byte-level and sentencepiece tokens begin
    with one.
    """
    text = ""
    found: dict[int, Turn] = {}
    for number, (role, content) in enumerate(turns):
        text += _ROLES[role]
        start = len(text)
        end = start + len(content)
        text += content
        if role == "assistant":
            text += eos_token
        found[number] = Turn(((start, end),), (end, len(text)))
    return text, found


def ask_plain(messages: Sequence[Message], format_name: str, eos_token: str) -> str:
    """Returns the text that asks for the next answer as rows of the format do, ready for it.

    Args:
        messages: roles and contents; a format without turns takes one, of the user.
        format_name: of the rows.
        eos_token: what ends an earlier answer.

    Raises:
        TemplateError: the format has no place for earlier turns or a system prompt.
    """
    if format_name in TURN_FORMATS:
        text, _ = join_turns(message_turns(messages), eos_token)
        return text + GUANACO_ASSISTANT
    if [message["role"] for message in messages] != ["user"]:
        raise TemplateError(
            f"rows of the format `{format_name}` are asked one message at a time, and there is no "
            "chat template: no system prompt and no earlier turns"
        )
    prompt = content_of(messages[0])
    if format_name in ("text", "input_output", "dummy"):
        return prompt
    row = {"prompt": prompt, "instruction": prompt, "question": prompt, "context": ""}
    return prompt_text(row, format_name)
