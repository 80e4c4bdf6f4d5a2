"""Which chat template a run uses: the tokenizer's own, a built-in one, a file's, or none."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdpq.cards.chat_templates import (
    BUILT_IN_TEMPLATES,
    NO_TEMPLATE,
    BuiltInTemplate,
)
from fsdpq.data.templates.jinja_text import ChatTemplate, TemplateError
from fsdpq.errors import Problem, RecipeError

PAD_TOKENS = (
    "<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>", "<unk>", "<|endoftext|>",
)  # fmt: skip
"""Tokens that models bring for padding, or can spare for it, best first."""


def choose_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, file_text: str | None = None
) -> ChatTemplate | None:
    """Returns the template that ``data.chat_template`` asks for, None for plain texts.

    Args:
        tokenizer: of the base model.
        chat_template: the recipe's value.
        file_text: what is in the file, where the value names one.

    Raises:
        RecipeError: the tokenizer lacks what a built-in template needs, or a file's template is
            wrong.
    """
    if chat_template == NO_TEMPLATE:
        return None
    names = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    if chat_template is None:
        return _own_template(tokenizer, names)
    if chat_template in BUILT_IN_TEMPLATES:
        built_in = BUILT_IN_TEMPLATES[chat_template]
        _check_tokens(tokenizer, chat_template, built_in)
        first = "{{ bos_token }}" if begins_texts(tokenizer) else ""
        return ChatTemplate(chat_template, first + built_in.source, special_tokens=names)
    if file_text is None:
        raise RuntimeError(f"the text of `{chat_template}` was not handed over")
    template = ChatTemplate(chat_template, file_text, special_tokens=names)
    _check_file(template)
    return template


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer puts its beginning-of-text token before every text."""
    encoded: Any = tokenizer("", add_special_tokens=True)
    ids = list(encoded["input_ids"])
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def exported_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, end_mark: str
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer to save beside a trained model: it asks as the model was trained.

    Its end-of-text token is the one that ends answers, so that generation stops there. Where it
    has no token for padding, or the same one, it gets one that it has and that ends nothing:
    collators of other tools leave out the loss of padding, by its id.

    Args:
        tokenizer: of the base model.
        template: that the rows were rendered with.
        end_mark: what ends an answer.
    """
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = template.source
    vocabulary, ends = saved.get_vocab(), {end_mark, str(saved.eos_token)}
    added: Any = saved.added_tokens_encoder
    if end_mark in added:
        saved.eos_token = end_mark
    if saved.pad_token is None or saved.pad_token in ends:
        spare = next((t for t in PAD_TOKENS if t in vocabulary and t not in ends), None)
        if spare is not None:
            saved.pad_token = spare
    return saved


def _own_template(
    tokenizer: PreTrainedTokenizerBase, special_tokens: dict[str, str]
) -> ChatTemplate | None:
    own: Any = tokenizer.chat_template
    if not own:
        return None
    name = "the tokenizer's own"
    try:
        source = tokenizer.get_chat_template()
        with_tools = tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:
        message = f"the tokenizer has several chat templates and no default: {', '.join(own)}"
        raise _unusable(
            message, "write the one to use into a file, `data.chat_template`"
        ) from error
    tools_source = with_tools if with_tools != source else None
    return ChatTemplate(name, source, tools_source, special_tokens)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, name: str, template: BuiltInTemplate) -> None:
    if template.needs_eos and tokenizer.eos_token_id is None:
        message = f"`data.chat_template: {name}` ends answers in the end-of-text token, and the "
        raise _unusable(
            f"{message}tokenizer has none", "set `eos_token` in its tokenizer_config.json"
        )
    missing = _missing_tokens(tokenizer, template)
    if missing:
        listed = ", ".join(f"`{token}`" for token in missing)
        usable = [
            known
            for known, other in BUILT_IN_TEMPLATES.items()
            if not _missing_tokens(tokenizer, other)
        ]
        message = f"`data.chat_template: {name}` needs the tokens {listed}, which this model's "
        raise _unusable(
            f"{message}tokenizer does not have",
            f"it can use {', '.join(usable)}; new tokens would have to be trained first",
        )


def _missing_tokens(tokenizer: PreTrainedTokenizerBase, template: BuiltInTemplate) -> list[str]:
    """Returns the tokens of a template that the tokenizer would spell out in several."""
    found: list[str] = []
    for token in template.tokens:
        encoded: Any = tokenizer(token, add_special_tokens=False)
        if len(encoded["input_ids"]) != 1:
            found.append(token)
    return found


def _check_file(template: ChatTemplate) -> None:
    """Raises where the text is no template, with its line."""
    try:
        template.render([{"role": "user", "content": "?"}])
    except TemplateError as error:
        wrong = error.__cause__
        if isinstance(wrong, jinja2.TemplateSyntaxError):
            message = f"`{template.name}` is no chat template: line {wrong.lineno}: {wrong.message}"
            raise _unusable(message, "see transformers' guide to chat templates") from error


def _unusable(message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(message, "data.chat_template", None, hint)])
