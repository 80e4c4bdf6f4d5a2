"""Renders a row of any format to one text, and says which of its characters carry loss.

Conversations go through the chat template where there is one; without, each format has a plain
text of its own. Positions are characters of the rendered text: `fsdpq.data.text.tokenize` tokenizes
it once, whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.jinja_text import ChatTemplate, Message, Span, TemplateError
from fsdpq.data.templates.marks import Turn
from fsdpq.data.templates.turns import ChatRenderer
from fsdpq.data.text.loss_spans import loss_spans, plan_loss, trains_mark
from fsdpq.data.text.plain_texts import (
    ANSWERS,
    TURN_FORMATS,
    ask_plain,
    guanaco_turns,
    join_turns,
    message_turns,
    prompt_text,
)
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import read_segments
from fsdpq.rows.messages import Conversation, is_conversation, read_conversation

Row = Mapping[str, Any]

UNTEMPLATED = ("text", "input_output", "dummy")
"""Formats whose text is the row's own, whatever template there is."""


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    Attributes:
        text: what the model reads.
        trained: ranges of its characters that carry loss, end exclusive.
        untrained: ranges that carry none even so.
        adds_eos: the tokenizer's end-of-text token is to follow.
        trains_eos: and carries loss.
    """

    text: str
    trained: list[Span]
    untrained: list[Span] = field(default_factory=list[Span])
    adds_eos: bool = False
    trains_eos: bool = False


class RowRenderer:
    """Renders rows of one format.

    Args:
        tokenizer: of the base model.
        options: the recipe's ``data``: what carries loss.
        format_name: the rows' format.
        template: what renders conversations, None for the plain texts of the formats.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        format_name: str,
        template: ChatTemplate | None,
    ) -> None:
        self.options = options
        self.format_name = format_name
        self.eos_token = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else None
        templated = template is not None and format_name not in UNTEMPLATED
        added: Any = tokenizer.added_tokens_encoder
        tokens = {*added, *tokenizer.all_special_tokens}
        self.chat = ChatRenderer(template, tokens) if template is not None and templated else None

    def render(self, row: Row) -> Rendered:
        """Returns the text of a row, with loss where the recipe wants it.

        Args:
            row: under its format's column names, without mistake.

        Raises:
            TemplateError: where the turns begin and end cannot be told.
        """
        options = self.options
        if self.format_name == "text":
            text: str = row["text"]
            return Rendered(text, [(0, len(text))], [], True, options.train_on_eos != "none")
        if self.format_name == "input_output":
            return _join_segments(row, whole=options.train_on_prompt)
        if self.chat is not None:
            return self._render_chat(self.chat, self._conversation(row))
        if self.format_name == "guanaco":
            return self._render_plain(guanaco_turns(row["text"]), None)
        if is_conversation(row, self.format_name):
            conversation = read_conversation(row)
            if conversation.tools:
                raise TemplateError("the row has tools, and there is no chat template to show them")
            return self._render_plain(
                message_turns(conversation.messages),
                conversation.flags(train_on_prompt=self.options.train_on_prompt),
            )
        return self._render_pair(row)

    @property
    def asks(self) -> str:
        """How it can be asked: ``conversation``, ``single`` messages, or ``text`` to go on with."""
        if self.chat is not None or self.format_name in TURN_FORMATS:
            return "conversation"
        return "text" if self.format_name in UNTEMPLATED else "single"

    def render_messages(self, messages: Sequence[Message]) -> str:
        """Returns the text that asks for an answer as rows of the format do, ready for it.

        Raises:
            TemplateError: the chat template refuses the conversation, or the format has no turns.
        """
        if self.chat is not None:
            return self.chat.render_prompt(messages)
        return ask_plain(messages, self.format_name, str(self.eos_token))

    def _conversation(self, row: Row) -> Conversation:
        """Returns a row as messages, without the prompt texts made for base models."""
        if is_conversation(row, self.format_name):
            return read_conversation(row)
        if self.format_name == "guanaco":
            turns = guanaco_turns(row["text"])
            messages = [{"role": role, "content": content.strip()} for role, content in turns]
            return Conversation(messages, [None] * len(messages))
        asked = {
            "prompt_completion": ("prompt",),
            "alpaca": ("instruction", "input"),
            "qna": ("context", "question"),
            "qna_no_ctx": ("question",),
        }
        parts = [row.get(column) for column in asked[self.format_name]]
        prompt = "\n\n".join(part for part in parts if part)
        answer = row[ANSWERS[self.format_name]]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Conversation(messages, [None, None])

    def _render_chat(self, chat: ChatRenderer, conversation: Conversation) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        roles = [message["role"] for message in messages]
        plan = plan_loss(
            roles, conversation.flags(train_on_prompt=self.options.train_on_prompt), self.options
        )
        text, turns = chat.render(messages, plan.wanted, tools)
        last = len(messages) - 1
        adds_eos = False
        if roles[-1] == "assistant":
            adds_eos = turns[last].mark[0] == turns[last].mark[1] if last in turns else False
            adds_eos = adds_eos or (last not in turns and chat.marks.of_answers(tools) == "")
        if adds_eos and self.eos_token is None:
            raise TemplateError("neither the chat template nor the tokenizer marks an answer's end")
        trained, untrained = loss_spans(text, turns, plan, self.options)
        trains_eos = adds_eos and trains_mark(last, plan, self.options)
        return Rendered(text, trained, untrained, adds_eos, trains_eos)

    def _render_plain(
        self, turns: list[tuple[str, str]], flags: list[bool | None] | None
    ) -> Rendered:
        roles = [role for role, _ in turns]
        plan = plan_loss(roles, flags or [None] * len(turns), self.options)
        text, places = join_turns(turns, str(self.eos_token))
        return Rendered(text, *loss_spans(text, places, plan, self.options))

    def _render_pair(self, row: Row) -> Rendered:
        prompt = prompt_text(row, self.format_name)
        text = prompt + row[ANSWERS[self.format_name]]
        asked, end = len(prompt), len(text)
        turns = {0: Turn(((0, asked),), (asked, asked)), 1: Turn(((asked, end),), (end, end))}
        plan = plan_loss(["user", "assistant"], [None, None], self.options)
        trains_eos = trains_mark(1, plan, self.options)
        return Rendered(text, *loss_spans(text, turns, plan, self.options), True, trains_eos)


def _join_segments(row: Row, *, whole: bool) -> Rendered:
    """Returns segments as one text, nothing added: their authors write every mark themselves."""
    text = ""
    trained: list[Span] = []
    for segment, is_trained in read_segments(row["segments"]):
        start = len(text)
        text += segment
        if is_trained or whole:
            if trained and trained[-1][1] == start:
                trained[-1] = (trained[-1][0], len(text))
            else:
                trained.append((start, len(text)))
    return Rendered(text, trained)
