"""Runs a chat template: a conversation in, text out, in transformers' sandbox.

The same function renders as behind ``apply_chat_template``, so that the text is the same to the
letter; it compiles a template once. https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, Any]
Span = tuple[int, int]
"""A range of characters, end exclusive."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(ValueError):
    """A row cannot be rendered; the text says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, ready to render.

    Attributes:
        name: where it came from, for people.
        source: its text, Jinja.
        tools_source: another one for conversations with tools, None for the same.
        special_tokens: the tokenizer's, by the names that templates give them (``eos_token``).
    """

    name: str
    source: str
    tools_source: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])

    def source_for(self, tools: Sequence[Any] | None) -> str:
        """Returns the Jinja text that renders a conversation with these tools."""
        return self.tools_source if tools and self.tools_source else self.source

    def marks_answers(self, tools: Sequence[Any] | None = None) -> bool:
        """Returns whether the template says itself, by ``generation``, what the model writes."""
        return _GENERATION.search(self.source_for(tools)) is not None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of a conversation.

        Raises:
            TemplateError: the template refuses it.
        """
        return self._run(messages, tools, add_generation_prompt, mark=False)[0]

    def try_render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str | None:
        """Returns the text of a conversation, None where the template refuses it."""
        try:
            return self.render(messages, tools, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            return None

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """Returns the text of a conversation, and what the template marks as generated.

        Raises:
            TemplateError: the template refuses it.
        """
        return self._run(messages, tools, False, mark=True)

    def _run(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        *,
        mark: bool,
    ) -> tuple[str, list[Span]]:
        conversation = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        render: Any = render_jinja_template  # the tokens are more arguments, by name
        try:
            texts, marks = render(
                [conversation],
                tools=list(tools) if tools else None,
                chat_template=self.source_for(tools),
                return_assistant_tokens_mask=mark,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses it: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            # Templates are programs: one that adds a text to nothing fails in Python's own way.
            raise TemplateError(f"the chat template fails: {error}") from error
        return texts[0], [tuple(span) for span in marks[0]] if mark else []
