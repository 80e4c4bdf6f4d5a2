"""Renders conversations by the tokenizer's chat template and tokenizes them with exact masks.

The loss mask comes from character positions: the template says where an answer's text starts and
ends, the tokenizer's offsets say which tokens lie inside. Nothing is tokenized twice, so a token
that merges across a boundary cannot shift the mask. The end-of-turn token of an answer is trained,
the template's white space after it is not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdpq.data.formats import Conversation
from fsdpq.errors import FsdpqError, Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions

TEMPLATE_HINT = "change the row, set `data.train_on_prompt: true`, or use another model"


class TemplateError(ValueError):
    """The chat template does not say which part of a conversation is an answer."""


@dataclass(frozen=True)
class Row:
    """One tokenized row.

    Attributes:
        input_ids: token ids.
        loss_mask: for each token, whether predicting it carries loss; the first never does.
    """

    input_ids: list[int]
    loss_mask: list[bool]

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class TokenizedData:
    """Rows ready for training, and what was done to them.

    Attributes:
        rows: those with at least one trained token.
        num_cut: rows longer than ``data.seq_len``, cut at their end.
        num_dropped: rows without a trained token, left out.
    """

    rows: list[Row]
    num_cut: int
    num_dropped: int

    def digest(self) -> str:
        """Returns a hash of all rows, to compare over ranks."""
        rows = hashlib.sha256()
        for row in self.rows:
            rows.update(repr(row).encode())
        return rows.hexdigest()


def tokenize_conversations(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> TokenizedData:
    """Tokenizes all conversations.

    Raises:
        RecipeError: the tokenizer has no chat template or no offsets, or no token of any row
            carries loss.
    """
    if not tokenizer.chat_template:
        raise _unusable("the tokenizer has no chat template", "use an instruct model")
    if not tokenizer.is_fast:
        raise _unusable("the tokenizer gives no character offsets", "use a fast tokenizer")
    rows: list[Row] = []
    num_cut = num_dropped = 0
    for number, conversation in enumerate(conversations, start=1):
        try:
            whole = tokenize_conversation(conversation, tokenizer, options.train_on_prompt)
        except TemplateError as error:
            raise _unusable(f"row {number}: {error}", TEMPLATE_HINT) from error
        row = Row(whole.input_ids[: options.seq_len], whole.loss_mask[: options.seq_len])
        num_cut += len(whole.input_ids) > options.seq_len
        if row.num_trained:
            rows.append(row)
        else:
            num_dropped += 1
    if not rows:
        raise _unusable(
            f"none of the {len(conversations)} rows has a token that carries loss",
            "look for missing assistant messages, or raise data.seq_len",
        )
    return TokenizedData(rows, num_cut, num_dropped)


def tokenize_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool
) -> Row:
    """Tokenizes one conversation.

    Raises:
        TemplateError: where answers begin and end cannot be told.
    """
    text = _render(tokenizer, conversation)
    spans = [(0, len(text))] if train_on_prompt else _answer_spans(tokenizer, conversation, text)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    loss_mask = [
        any(start >= low and end <= high and end > start for low, high in spans)
        for start, end in encoded["offset_mapping"]
    ]
    if loss_mask:
        loss_mask[0] = False
    return Row(list(encoded["input_ids"]), loss_mask)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns the token ids of a user's prompt, ready for the model's answer.

    Raises:
        RecipeError: the chat template refuses a conversation of one user message.
    """
    messages = [{"role": "user", "content": prompt}]
    try:
        text = _render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        raise _unusable(f"the prompt `{prompt}`: {error}", "use another model") from error
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str
) -> list[tuple[int, int]]:
    """Character ranges of the answers in ``text``, end-of-turn mark included."""
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, conversation[:index], add_generation_prompt=True)
        upto = _render(tokenizer, conversation[: index + 1])
        if not (text.startswith(before) and text.startswith(upto)):
            raise TemplateError("the chat template renders a turn differently when more follows")
        spans.append((len(before), len(upto.rstrip())))
    return spans


def _render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    add_generation_prompt: bool = False,
) -> str:
    if not conversation:
        raise TemplateError("the conversation starts with the assistant")
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refuses it: {error}") from error
    return str(text)


def _unusable(message: str, hint: str) -> FsdpqError:
    return RecipeError([Problem(message, "data", None, hint)])
