"""Which tokens carry loss."""

from __future__ import annotations

import pytest
from support.tokenizer import build_tokenizer

from fsdpq.data.tokenize import prompt_ids, tokenize_conversation, tokenize_conversations
from fsdpq.errors import RecipeError
from fsdpq.recipe.sections.data import DataOptions

CHAT = [
    {"role": "user", "content": "What is one?"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "I am fine"},
]


def _trained_text(conversation: list[dict[str, str]], **options: object) -> str:
    tokenizer = build_tokenizer()
    row = tokenize_conversation(conversation, tokenizer, bool(options.get("train_on_prompt")))
    ids = [i for i, trained in zip(row.input_ids, row.loss_mask, strict=True) if trained]
    return str(tokenizer.decode(ids))


def test_answers_and_their_end_of_turn_are_trained() -> None:
    assert _trained_text(CHAT) == "two three<|im_end|>I am fine<|im_end|>"


def test_train_on_prompt_trains_all_but_the_first_token() -> None:
    text = _trained_text(CHAT, train_on_prompt=True)
    assert text.startswith("user\nWhat is one?<|im_end|>\n<|im_start|>assistant\ntwo three")


def test_the_tokens_are_those_of_transformers_own_template_call() -> None:
    tokenizer = build_tokenizer()
    row = tokenize_conversation(CHAT, tokenizer, train_on_prompt=False)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    assert row.input_ids == expected["input_ids"]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_the_mask_is_that_of_transformers_generation_tags() -> None:
    tagged = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer(template=tagged)
    expected = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = tokenize_conversation(CHAT, tokenizer, train_on_prompt=False)
    assert [int(t) for t in row.loss_mask] == expected["assistant_masks"]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_token_that_merges_across_the_boundary_is_not_trained() -> None:
    # "A: yes" is one token: it begins in the prompt and ends in the answer. Encoding the prompt
    # alone would give other tokens and shift the mask.
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} {% else %}"
        "A: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    tokenizer = build_tokenizer(
        template=template, texts=["A: yes"] * 50, vocab_size=264, split=False
    )
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "yes sure"}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = text.index("yes")
    crossing = [s < begin < e for s, e in encoded["offset_mapping"]]  # pyright: ignore[reportGeneralTypeIssues]
    assert any(crossing), "the tokenizer must merge across the boundary for this test to say much"
    row = tokenize_conversation(chat, tokenizer, train_on_prompt=False)
    assert row.num_trained == len(" sure")
    for (start, _), trained in zip(encoded["offset_mapping"], row.loss_mask, strict=True):  # pyright: ignore[reportArgumentType]
        assert not (trained and start < begin)


def test_a_long_row_is_cut_and_a_row_without_loss_is_left_out() -> None:
    long_answer = [CHAT[0], {"role": "assistant", "content": "four " * 100}]
    no_answer = [{"role": "user", "content": "hello"}]
    options = DataOptions(path="x", seq_len=32)
    data = tokenize_conversations([long_answer, no_answer], build_tokenizer(), options)
    assert [len(row.input_ids) for row in data.rows] == [32]
    assert (data.num_cut, data.num_dropped) == (1, 1)


def test_data_without_any_loss_is_an_error() -> None:
    no_answer = [{"role": "user", "content": "hello"}]
    with pytest.raises(RecipeError) as caught:
        tokenize_conversations([no_answer], build_tokenizer(), DataOptions(path="x"))
    assert "none of the 1 rows has a token that carries loss" in caught.value.problems[0].message


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RecipeError) as caught:
        tokenize_conversations([CHAT], tokenizer, DataOptions(path="x"))
    assert caught.value.problems[0].message == "the tokenizer has no chat template"


def test_a_row_that_the_template_refuses_is_named() -> None:
    guarded = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    template = guarded + build_tokenizer().chat_template  # pyright: ignore[reportOperatorIssue]
    tokenizer = build_tokenizer(template=template)
    refused = [{"role": "system", "content": "be kind"}, *CHAT]
    with pytest.raises(RecipeError) as caught:
        tokenize_conversations([CHAT, refused], tokenizer, DataOptions(path="x"))
    message = caught.value.problems[0].message
    assert message == "row 2: the chat template refuses it: no system role"


def test_a_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = build_tokenizer()
    text = tokenizer.decode(prompt_ids(tokenizer, "hello"))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
