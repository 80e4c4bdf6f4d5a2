"""Which tokens of a chat carry loss, and what becomes of long rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.rows import TokenizedRows, tokenize_rows
from support.tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import Row, RowTokenizer, digest_rows, make_dummy_rows
from fsdpq.recipe.sections.data import DataOptions

CHAT = [
    {"role": "user", "content": "What is one?"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "I am fine"},
]


def _options(**changes: Any) -> DataOptions:
    return DataOptions(**({"path": "x", "format": "messages"} | changes))


def _row(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Row:
    [row] = tokenize_rows([{"messages": messages}], tokenizer, _options(**changes)).rows
    return row


def _trained_text(messages: list[dict[str, str]], **changes: Any) -> str:
    tokenizer = build_tokenizer()
    row = _row(messages, tokenizer, **changes)
    ids = [i for i, trained in zip(row.input_ids, row.loss_mask, strict=True) if trained]
    return str(tokenizer.decode(ids))


def test_answers_and_their_end_of_turn_are_trained() -> None:
    assert _trained_text(CHAT) == "two three<|im_end|>I am fine<|im_end|>"


def test_train_on_prompt_trains_all_but_the_first_token() -> None:
    text = _trained_text(CHAT, train_on_prompt=True)
    assert text.startswith("user\nWhat is one?<|im_end|>\n<|im_start|>assistant\ntwo three")


def test_the_tokens_are_those_of_transformers_own_template_call() -> None:
    tokenizer = build_tokenizer()
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    assert list(_row(CHAT, tokenizer).input_ids) == expected["input_ids"]  # pyright: ignore[reportArgumentType, reportCallIssue]


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
    assert list(_row(CHAT, tokenizer).loss_mask) == expected["assistant_masks"]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_an_answer_that_the_template_leaves_unmarked_gets_an_end_of_text_token() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = build_tokenizer(template=template)
    row = _row(CHAT[:2], tokenizer)
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert row.loss_mask[-1]
    tokenizer.eos_token = None
    [mistake] = tokenize_rows([SHORT], tokenizer, _options()).chunk.unrendered
    assert "marks an answer's end" in mistake.message


def test_an_empty_answer_trains_its_end_only() -> None:
    empty = [CHAT[0], {"role": "assistant", "content": ""}]
    assert _trained_text(empty) == "<|im_end|>"


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
    row = _row(chat, tokenizer)
    assert row.num_trained == len(" sure") + 1, "the rest of the answer and the end-of-text token"
    for (start, _), trained in zip(encoded["offset_mapping"], row.loss_mask, strict=False):  # pyright: ignore[reportArgumentType]
        assert not (trained and start < begin)


LONG = {"messages": [CHAT[0], {"role": "assistant", "content": "four " * 100}]}
SHORT = {"messages": CHAT[:2]}
NO_ANSWER = {"messages": [{"role": "user", "content": "hello"}]}


def _tokenize(rows: list[Mapping[str, Any]], **changes: Any) -> TokenizedRows:
    return tokenize_rows(rows, build_tokenizer(), _options(seq_len=48, **changes))


def test_a_long_row_is_cut_and_a_row_without_loss_is_left_out() -> None:
    data = _tokenize([LONG, NO_ANSWER])
    assert [len(row.input_ids) for row in data.rows] == [48]
    chunk = data.chunk
    assert (chunk.num_cut, chunk.num_too_long, chunk.num_untrained) == (1, 0, 1)


def test_a_row_cut_at_its_start_keeps_its_end() -> None:
    whole = tokenize_rows([LONG], build_tokenizer(), _options(seq_len=4096)).rows[0]
    [cut] = _tokenize([LONG], truncation="truncate_start").rows
    assert list(cut.input_ids) == list(whole.input_ids[-48:])
    assert not cut.loss_mask[0]
    assert list(cut.loss_mask[1:]) == list(whole.loss_mask[-47:])


def test_long_rows_are_dropped_or_refused_by_policy() -> None:
    data = _tokenize([LONG, SHORT], truncation="drop")
    assert (len(data.rows), data.chunk.num_cut, data.chunk.num_too_long) == (1, 0, 1)
    [mistake] = _tokenize([SHORT, LONG], truncation="error").chunk.over_length
    assert (mistake.place, "tokens, and `data.seq_len` is 48" in mistake.message) == (1, True)


def test_a_row_that_the_template_refuses_is_named() -> None:
    guarded = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    template = guarded + build_tokenizer().chat_template  # pyright: ignore[reportOperatorIssue]
    refused = {"messages": [{"role": "system", "content": "be kind"}, *CHAT]}
    chunk = tokenize_rows([SHORT, refused], build_tokenizer(template=template), _options()).chunk
    [mistake] = chunk.unrendered
    expected = (1, "the chat template refuses it: no system role")
    assert (mistake.place, mistake.message) == expected


def test_a_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = build_tokenizer()
    template = choose_template(tokenizer, None)
    asks = RowTokenizer(tokenizer, _options(), "messages", template=template)
    text = tokenizer.decode(asks.prompt_ids("hello"))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_dummy_rows_fill_the_sequence_and_train_all_of_it() -> None:
    tokenizer = build_tokenizer()
    data = make_dummy_rows(tokenizer, DataOptions(format="dummy", max_rows=3, seq_len=32))
    assert [(len(row.input_ids), row.num_trained) for row in data] == [(32, 31)] * 3
    assert len({bytes(row.input_ids) for row in data}) == 3
    assert all(0 <= i < tokenizer.vocab_size for row in data for i in row.input_ids)


def test_the_digest_tells_rows_apart() -> None:
    one, other = _tokenize([SHORT]), _tokenize([SHORT], train_on_prompt=True)
    again = _tokenize([SHORT])
    assert digest_rows(one.rows) == digest_rows(again.rows) != digest_rows(other.rows)
