"""Every format under three kinds of tokenizer: the text, and exactly which tokens carry loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.rows import tokenize_rows
from support.tokenizer import (
    build_metaspace_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.render import RowRenderer
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.errors import RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.examples import made_up_rows


def _base_bpe() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


BASES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bpe": _base_bpe,
    "metaspace": build_metaspace_tokenizer,
    "wordpiece": build_wordpiece_tokenizer,
}
ALPACA = {"instruction": "Count.", "input": "", "output": "one two"}
WITH_INPUT = {"instruction": "Count.", "input": "three", "output": "one two"}
QNA = {"question": "How many?", "context": "Rows.", "answer": "four"}
GUANACO = "### Human: hello### Assistant: fine### Human: and you?### Assistant: one two"
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "and you?"},
    {"role": "assistant", "content": "one two"},
]
# The prompts of Stanford Alpaca and fsdp_qlora, written out: what the seed trained on.
ALPACA_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nCount.\n\n### Response:"
)
ALPACA_INPUT_TEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nCount.\n\n### Input:\nthree\n\n### Response:"
)


def _tokenize(row: dict[str, Any], name: str, tokenizer: Any, **changes: Any) -> Row:
    options = DataOptions(path="x", format=name, seq_len=4096, **changes)  # pyright: ignore[reportArgumentType]
    [tokenized] = tokenize_rows([row], tokenizer, options).rows
    return tokenized


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, name: str) -> list[int]:
    template = choose_template(tokenizer, None)
    return RowTokenizer(tokenizer, DataOptions(), name, template=template).prompt_ids(prompt)


def _trained_ids(row: Row) -> list[int]:
    return [i for i, trained in zip(row.input_ids, row.loss_mask, strict=True) if trained]


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        ("alpaca", ALPACA, ALPACA_TEXT, "one two"),
        ("alpaca", WITH_INPUT, ALPACA_INPUT_TEXT, "one two"),
        ("qna", QNA, "###Context:\nRows.\n###Question:\nHow many?\n###Answer:\n", "four"),
        ("qna_no_ctx", QNA, "###Question:\nHow many?\n###Answer:\n", "four"),
        ("prompt_completion", {"prompt": "hello:", "completion": " fine"}, "hello:", " fine"),
    ],
)
@pytest.mark.parametrize("kind", BASES)
def test_a_base_model_learns_the_answer_and_its_end(
    kind: str, name: str, row: dict[str, Any], prompt: str, answer: str
) -> None:
    tokenizer = BASES[kind]()
    tokenized = _tokenize(row, name, tokenizer)
    whole = tokenizer(prompt + answer, return_offsets_mapping=True)
    eos = tokenizer.eos_token_id
    assert list(tokenized.input_ids) == [*whole["input_ids"], eos]  # pyright: ignore[reportGeneralTypeIssues]
    offsets: Any = whole["offset_mapping"]
    expected = [i for i, (s, e) in enumerate(offsets) if s >= len(prompt) and e > s]
    trained = [i for i, flag in enumerate(tokenized.loss_mask) if flag]
    assert trained == [*expected, len(offsets)]
    assert expected, "the answer must have tokens of its own for this test to say much"
    everything = _tokenize(row, name, tokenizer, train_on_prompt=True)
    adds_bos = tokenizer.bos_token_id == tokenized.input_ids[0]
    assert everything.num_trained == len(everything.input_ids) - 1, f"bos: {adds_bos}"


@pytest.mark.parametrize("kind", BASES)
def test_every_turn_of_the_assistant_is_trained_and_ends(kind: str) -> None:
    tokenizer = BASES[kind]()
    rows = [_tokenize({"text": GUANACO}, "guanaco", tokenizer)]
    rows.append(_tokenize({"messages": MESSAGES}, "messages", tokenizer))
    eos = tokenizer.eos_token
    parts = [
        ("### Human: hello### Assistant:", False), (f" fine{eos}", True),
        ("### Human: and you?### Assistant:", False), (f" one two{eos}", True),
    ]  # fmt: skip
    text = "".join(part for part, _ in parts)
    assert list(rows[0].input_ids) == tokenizer(text)["input_ids"]
    decoded = tokenizer.decode(_trained_ids(rows[0])).replace(" ", "")
    assert decoded == f"fine{eos}onetwo{eos}"
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", BASES)
def test_plain_text_is_trained_whole_and_ends(kind: str) -> None:
    tokenizer = BASES[kind]()
    row = _tokenize({"text": "hello there"}, "text", tokenizer)
    assert list(row.input_ids) == [*tokenizer("hello there")["input_ids"], tokenizer.eos_token_id]  # pyright: ignore[reportGeneralTypeIssues]
    assert list(row.loss_mask) == [0] + [1] * (len(row.input_ids) - 1)


def test_a_tokenizer_that_adds_its_own_end_of_text_does_not_get_two() -> None:
    tokenizer = build_metaspace_tokenizer()
    from tokenizers import processors

    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=ids
    )
    row = _tokenize(QNA, "qna", tokenizer)
    assert list(row.input_ids).count(tokenizer.eos_token_id) == 1
    assert row.loss_mask[-1]
    assert _prompt_ids(tokenizer, "How many?", "qna")[-1] != tokenizer.eos_token_id


CROSSED = {
    "bpe": [("a", "bc d"), ("a ", " b"), ("one", "\n\ntwo"), ("x:", ":: y"), ("ét", "é a")],
    "metaspace": [("a", "bc d"), ("x:", ":: y"), ("ét", "é a"), ("tw", "o"), ("a ", "bc")],
    "wordpiece": [("a", "bc d"), ("tw", "o three"), ("on", "e"), ("xy", "z one")],
}


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [(kind, *boundary) for kind, boundaries in CROSSED.items() for boundary in boundaries],
)
def test_a_token_that_crosses_into_the_answer_is_not_trained(
    kind: str, prompt: str, answer: str
) -> None:
    texts = [f"{prompt}{answer}"] * 50 + ["three", "one", "two"] * 20
    builders = {
        "bpe": lambda: build_tokenizer(texts=texts, vocab_size=300, split=False),
        "metaspace": lambda: build_metaspace_tokenizer(texts),
        "wordpiece": lambda: build_wordpiece_tokenizer(texts),
    }
    tokenizer = builders[kind]()
    tokenizer.chat_template = None
    prompt = f"Q? {prompt}"  # a row's first token never carries loss: the boundary comes later
    offsets: Any = tokenizer(prompt + answer, return_offsets_mapping=True)["offset_mapping"]
    begin = len(prompt)
    assert any(0 < start < begin < end for start, end in offsets), "nothing crosses the boundary"
    row = _tokenize({"prompt": prompt, "completion": answer}, "prompt_completion", tokenizer)
    for (start, end), trained in zip(offsets, row.loss_mask, strict=False):
        assert bool(trained) == (start >= begin and end > start)
    assert row.loss_mask[-1], "the end-of-text token"


def test_spaces_of_an_answer_are_trained_where_the_tokenizer_trims_their_offsets() -> None:
    from tokenizers import pre_tokenizers, processors

    tokenizer = _base_bpe()
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    row = {"prompt": "a:", "completion": "b   c"}
    plain = _tokenize(row, "prompt_completion", tokenizer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    offsets: Any = tokenizer("a:b   c", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets), "a token of spaces must look empty"
    assert _tokenize(row, "prompt_completion", tokenizer) == plain


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        ("alpaca", ALPACA, "Count.", "one two"),
        ("alpaca", WITH_INPUT, "Count.\n\nthree", "one two"),
        ("qna", QNA, "Rows.\n\nHow many?", "four"),
        ("qna_no_ctx", QNA, "How many?", "four"),
        ("prompt_completion", {"prompt": "hello:", "completion": " fine"}, "hello:", " fine"),
    ],
)
def test_a_chat_model_gets_the_same_row_through_its_template(
    name: str, row: dict[str, Any], prompt: str, answer: str
) -> None:
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    expected = _tokenize({"messages": messages}, "messages", tokenizer)
    assert _tokenize(row, name, tokenizer) == expected
    assert tokenizer.decode(_trained_ids(expected)) == f"{answer}<|im_end|>"


def test_guanaco_and_sharegpt_are_the_same_conversation_for_a_chat_model() -> None:
    tokenizer = build_tokenizer()
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in MESSAGES]
    expected = _tokenize({"messages": MESSAGES}, "messages", tokenizer)
    assert _tokenize({"text": GUANACO}, "guanaco", tokenizer) == expected
    assert _tokenize({"messages": sharegpt}, "messages", tokenizer) == expected


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["alpaca", "qna_no_ctx", "prompt_completion", "messages"])
def test_a_sample_prompt_is_asked_as_the_rows_are(kind: str, name: str) -> None:
    tokenizer = BASES[kind]()
    rows = {
        "alpaca": {"instruction": "hello", "output": "one"},
        "qna_no_ctx": {"question": "hello", "answer": "one"},
        "prompt_completion": {"prompt": "hello", "completion": " one"},
        "messages": {"messages": [{"role": "user", "content": "hello"}, MESSAGES[1]]},
    }
    row = _tokenize(rows[name], name, tokenizer)
    asked = _prompt_ids(tokenizer, "hello", name)
    first_trained = list(row.loss_mask).index(1)
    assert asked == list(row.input_ids[:first_trained])


def test_a_base_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = _base_bpe()
    tokenizer.eos_token = None
    with pytest.raises(RecipeError) as caught:
        _tokenize(QNA, "qna", tokenizer)
    assert "would not learn to stop" in caught.value.problems[0].message


@pytest.mark.parametrize("name", ["messages", "guanaco", "alpaca", "text", "qna"])
def test_made_up_rows_can_be_rendered_with_and_without_template(name: str) -> None:
    for tokenizer in (build_tokenizer(), _base_bpe()):
        for row in made_up_rows(name, 4):
            renderer = RowRenderer(tokenizer, DataOptions(), name, choose_template(tokenizer, None))
            rendered = renderer.render(row)
            assert all(0 <= low < high <= len(rendered.text) for low, high in rendered.trained)
            assert rendered.trained
