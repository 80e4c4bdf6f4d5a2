"""Which chat template a run uses: the tokenizer's own, a built-in one, a file's, or none."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = "none"
"""Value of ``data.chat_template`` for the plain texts of the formats."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        name: where it came from, for people.
        source: its text, Jinja.
    """

    name: str
    source: str


def choose_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> ChatTemplate | None:
    """Returns the template that ``data.chat_template`` asks for, None for plain texts."""
    if chat_template == NO_TEMPLATE or not tokenizer.chat_template:
        return None
    return ChatTemplate("the tokenizer's own", tokenizer.get_chat_template())
