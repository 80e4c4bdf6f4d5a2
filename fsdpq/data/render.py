"""Renders a row of any format to one text, and says which of its characters carry loss.

Answers go through the tokenizer's chat template where it has one; a base model gets the plain text
of the format instead, the prompts of Stanford Alpaca and of fsdp_qlora, and an end-of-text token.
Positions are characters of the rendered text: `fsdpq.data.tokenize` tokenizes it once, whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.choose import ChatTemplate
from fsdpq.rows.formats import GUANACO_ASSISTANT, GUANACO_HUMAN, plain_messages

Message = dict[str, str]
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

_ANSWERS = {
    "prompt_completion": "completion", "alpaca": "output", "qna": "answer", "qna_no_ctx": "answer",
}  # fmt: skip
_PLAIN_ROLES = {"system": "### System:", "user": GUANACO_HUMAN, "assistant": GUANACO_ASSISTANT}
_GUANACO_TURN = re.compile(f"({GUANACO_HUMAN}|{GUANACO_ASSISTANT})")


class TemplateError(ValueError):
    """The chat template does not say which part of a conversation is an answer."""


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    Attributes:
        text: what the model reads.
        spans: ranges of its characters that carry loss, end exclusive.
        needs_eos: the tokenizer's end-of-text token is to follow, and carries loss.
    """

    text: str
    spans: list[tuple[int, int]]
    needs_eos: bool


def is_templated(template: ChatTemplate | None, format_name: str) -> bool:
    """Returns whether the chat template writes the text, its own special tokens included."""
    return template is not None and format_name not in ("text", "dummy")


def render_row(
    row: Row,
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
) -> Rendered:
    """Renders one row, with loss on its answers; on all of it in format ``text``.

    Raises:
        TemplateError: where answers begin and end cannot be told.
    """
    if format_name == "text":
        return Rendered(row["text"], [(0, len(row["text"]))], needs_eos=True)
    if template is not None:
        return _render_chat(_messages_of(row, format_name), tokenizer, template)
    if format_name == "guanaco":
        return _render_turns(_guanaco_turns(row["text"]), tokenizer)
    if format_name == "messages":
        messages = plain_messages(row["messages"])
        turns = [(message["role"], f" {message['content']}") for message in messages]
        return _render_turns(turns, tokenizer)
    prompt = _plain_prompt(row, format_name)
    text = prompt + row[_ANSWERS[format_name]]
    return Rendered(text, [(len(prompt), len(text))], needs_eos=True)


def render_prompt(
    prompt: str,
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
) -> str:
    """Returns the text that asks ``prompt`` as rows of the format do, ready for the answer.

    Raises:
        TemplateError: the chat template refuses a conversation of one user message.
    """
    if template is not None and is_templated(template, format_name):
        messages = [{"role": "user", "content": prompt}]
        return _apply_template(tokenizer, template, messages, add_generation_prompt=True)
    if format_name in ("messages", "guanaco"):
        return f"{GUANACO_HUMAN} {prompt}{GUANACO_ASSISTANT}"
    if format_name in ("text", "dummy"):
        return prompt
    row = {"prompt": prompt, "instruction": prompt, "question": prompt, "context": ""}
    return _plain_prompt(row, format_name)


def _plain_prompt(row: Row, format_name: str) -> str:
    if format_name == "alpaca":
        return (ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT).format_map(row)
    templates = {"qna": QNA, "qna_no_ctx": QNA_NO_CONTEXT}
    return templates.get(format_name, "{prompt}").format_map(row)


def _messages_of(row: Row, format_name: str) -> list[Message]:
    """Returns a row as messages, without the prompt texts made for base models."""
    if format_name == "messages":
        return plain_messages(row["messages"])
    if format_name == "guanaco":
        turns = _guanaco_turns(row["text"])
        return [{"role": role, "content": content.strip()} for role, content in turns]
    asked = {
        "prompt_completion": ("prompt",),
        "alpaca": ("instruction", "input"),
        "qna": ("context", "question"),
        "qna_no_ctx": ("question",),
    }
    parts = [row.get(column) for column in asked[format_name]]
    prompt = "\n\n".join(part for part in parts if part)
    answer = row[_ANSWERS[format_name]]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _guanaco_turns(text: str) -> list[tuple[str, str]]:
    """Returns role and text of the turns, white space kept."""
    _, *parts = _GUANACO_TURN.split(text)
    roles = {GUANACO_HUMAN: "user", GUANACO_ASSISTANT: "assistant"}
    return [(roles[mark], turn) for mark, turn in zip(parts[::2], parts[1::2], strict=True)]


def _render_turns(turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Renders turns in guanaco's marks, for tokenizers without a chat template.

    An answer begins right after its mark, with its space: byte-level and sentencepiece tokens begin
    with one. Every answer ends in the end-of-text token, so the model learns to stop at each.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    for role, content in turns:
        text += _PLAIN_ROLES[role]
        start = len(text)
        text += content
        if role == "assistant":
            text += str(tokenizer.eos_token)
            spans.append((start, len(text)))
    return Rendered(text, spans, needs_eos=False)


def _render_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Rendered:
    """Renders by the chat template: an answer's span has its end-of-turn mark, not what follows."""
    text = _apply_template(tokenizer, template, messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply_template(tokenizer, template, messages[:index], add_generation_prompt=True)
        is_last = index == len(messages) - 1
        upto = text if is_last else _apply_template(tokenizer, template, messages[: index + 1])
        if not (text.startswith(before) and text.startswith(upto)):
            raise TemplateError("the chat template renders a turn differently when more follows")
        spans.append((len(before), len(upto.rstrip())))
    return Rendered(text, spans, needs_eos=_ends_unmarked(text, spans, messages[-1], tokenizer))


def _ends_unmarked(
    text: str,
    spans: list[tuple[int, int]],
    last: Message,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Returns whether nothing in the text tells the model to stop after the last answer."""
    if last["role"] != "assistant":
        return False
    unmarked = text[slice(*spans[-1])].strip() == last["content"].strip()
    if unmarked and tokenizer.eos_token_id is None:
        raise TemplateError("neither the chat template nor the tokenizer marks an answer's end")
    return unmarked


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[Message],
    add_generation_prompt: bool = False,
) -> str:
    if not messages:
        raise TemplateError("the conversation starts with the assistant")
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template.source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refuses it: {error}") from error
    return str(text)
