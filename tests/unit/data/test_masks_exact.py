"""Masks at adversarial boundaries, for three kinds of tokenizer and any text.

The reference is a tokenizer's own list of offsets, looked at token by token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.templates import trained_pieces
from support.tokenizer import (
    CHATML,
    build_metaspace_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.token_spans import mask_by_offsets, mask_tokens, reports_all_tokens
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions

BITS = [
    "a", "bc", " ", "  ", "\n", "\r\n", "\t", "é", "e\u0301", "ß", "İ", "中文", "👩‍👩‍👧", "👍🏽",
    "\u200d", "\u00a0", ".", "##", "▁", "<s>", "</s>", "<|im_end|>", "<|im_start|>assistant\n", "Ġ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(BITS) | st.text(max_size=4), max_size=8).map("".join)
KINDS = ("bpe", "merging bpe", "metaspace", "wordpiece")


@cache
def _tokenizer(kind: str) -> PreTrainedTokenizerBase:
    corpus = ["".join(BITS), "a bc", "bca é 中文", "assistant\na"] * 20
    built = {
        "bpe": lambda: build_tokenizer(texts=corpus, vocab_size=360),
        "merging bpe": lambda: build_tokenizer(texts=corpus, vocab_size=360, split=False),
        "metaspace": lambda: build_metaspace_tokenizer(corpus),
        "wordpiece": lambda: build_wordpiece_tokenizer(corpus),
    }
    return built[kind]()


def _expected(encoding: Encoding, low: int, high: int) -> list[int]:
    """Returns the mask of one range, token by token; empty tokens belong to their neighbours."""
    inside = [
        index
        for index, (start, end) in enumerate(encoding.offsets)
        if low <= start < end <= high and not encoding.special_tokens_mask[index]
    ]
    covered = range(min(inside), max(inside) + 1) if inside else range(0)
    return [int(index in covered) for index in range(len(encoding))]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), TEXTS, TEXTS, TEXTS)
def test_the_tokens_inside_a_range_are_those_of_the_offsets(
    kind: str, before: str, inside: str, behind: str
) -> None:
    backend: Any = _tokenizer(kind).backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    encoding = backend.encode(before + inside + behind)
    span = (len(before), len(before) + len(inside))
    expected = _expected(encoding, *span)
    assert mask_by_offsets(encoding, [span], []).tolist() == expected
    if reports_all_tokens(backend.encode):
        assert mask_tokens(encoding, [span], []).tolist() == expected
        whole = [(0, len(before + inside + behind))]
        left = mask_tokens(encoding, whole, [span]).tolist()
        assert left == mask_by_offsets(encoding, whole, [span]).tolist()
        touched = [low < span[1] and high > span[0] for low, high in encoding.offsets]
        left_there = [flag for flag, touch in zip(left, touched, strict=True) if touch]
        assert not inside or not any(left_there)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["bpe", "merging bpe"]), TEXTS, TEXTS, st.booleans())
def test_what_is_trained_decodes_to_the_answer(
    kind: str, question: str, answer: str, by_template: bool
) -> None:
    tokenizer: Any = _tokenizer(kind)
    tokenizer.chat_template = CHATML
    template = choose_template(tokenizer, None if by_template else "none")
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = rows.tokenize([{"messages": chat}])[0]
    assert isinstance(row, Row), row
    expected = f"{answer}<|im_end|>" if by_template else f" {answer}<|im_end|>"
    found = "".join(trained_pieces(row, tokenizer))
    # A token that begins in the prompt is not trained: the start of the answer may be missing.
    assert expected.endswith(found) or "\ufffd" in found
    missing = len(expected) - len(found)
    prompt = rows.prompt_ids(question)
    first = int(row.loss_mask.argmax())
    if missing <= 0:
        assert row.input_ids[:first].tolist() == prompt or kind == "merging bpe"


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(KINDS), st.lists(TEXTS, min_size=2, max_size=6))
def test_plans_and_single_probes_find_the_same_turns(kind: str, contents: list[str]) -> None:
    tokenizer: Any = _tokenizer(kind)
    tokenizer.chat_template = CHATML
    template = choose_template(tokenizer, None)
    roles = ["user", "assistant"] * len(contents)
    chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    chat_renderer: Any = rows.renderer.chat
    text, turns = chat_renderer.render(chat, range(len(chat)))
    for number, message in enumerate(chat):
        if message["role"] == "user" and not message["content"].strip():
            assert turns[number].body == ()
            continue
        [(start, end)] = turns[number].body
        assert text[start:end] == message["content"]
        assert text[slice(*turns[number].mark)] == "<|im_end|>"
        assert chat_renderer._turn_alone(text, chat, number, None) == turns[number]


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_longer_than_the_steps_is_found(kind: str) -> None:
    backend: Any = _tokenizer(kind).backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    text = "a" + "\n" * 200 + "bc" + " " * 200 + "a"
    encoding = backend.encode(text)
    for span in ((1, len(text) - 1), (1, 150), (0, 100)):
        assert mask_tokens(encoding, [span], []).tolist() == _expected(encoding, *span)
