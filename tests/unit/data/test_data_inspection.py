"""Lengths, drawn rows, stretches of text and findings, each against something that is not ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import tokenize_rows
from support.tokenizer import (
    build_metaspace_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from fsdpq.data.inspection.content import find_role_mistakes, fingerprint
from fsdpq.data.inspection.findings import MAX_EXAMPLES, MAX_GROUPS, OTHERS, Findings, Place
from fsdpq.data.inspection.lengths import describe_lengths
from fsdpq.data.inspection.packing import padding_share
from fsdpq.data.inspection.samples import Reservoir, segments, token_table
from fsdpq.data.text.tokenize import Row
from fsdpq.recipe.sections.data import DataOptions

LENGTHS = np.random.default_rng(0).lognormal(5, 0.8, 3000).astype(np.int32) + 1
CHAT = [
    {"role": "user", "content": "What is one? caf\u00e9 \U0001f642"},
    {"role": "assistant", "content": "\U0001f469\u200d\U0001f4bb two\n\n\u4f60\u597d three \u00e9"},
    {"role": "user", "content": " hello\t"},
    {"role": "assistant", "content": "I am fine"},
]


def test_quantiles_are_those_of_numpy() -> None:
    found = describe_lengths(LENGTHS, 512)["quantiles"]
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    for name, share in shares.items():
        assert found[name] == np.quantile(LENGTHS, share, method="inverted_cdf"), name


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1], np.array([1, 1, 1]), LENGTHS // 50 + 1])
def test_histogram_is_that_of_numpy(lengths: np.ndarray) -> None:
    bins = describe_lengths(lengths, 512)["histogram"]
    assert sum(entry["rows"] for entry in bins) == len(lengths)
    edges = [entry["low"] for entry in bins] + [bins[-1]["high"] or lengths.max() + 1]
    # numpy's last bin has its upper edge inside.
    expected, _ = np.histogram(lengths, [*edges[:-1], edges[-1] - 0.5])
    assert [entry["rows"] for entry in bins] == expected.tolist()
    assert bins[0]["rows"] > 0
    assert len(bins) <= 22


def test_few_long_rows_do_not_squeeze_the_others_together() -> None:
    bins = describe_lengths(np.append(LENGTHS, 10**6), 512)["histogram"]
    assert (bins[-1]["high"], len(bins) > 8) == (None, True)
    assert bins[-1]["rows"] < 0.01 * len(LENGTHS)


def test_suggested_limit_keeps_99_percent_and_not_much_more() -> None:
    limit = describe_lengths(LENGTHS, 128)["limit"]
    assert np.mean(limit["keeps"] >= LENGTHS) >= 0.99
    assert np.mean(limit["keeps"] - 64 >= LENGTHS) < 0.99
    assert limit["keeps"] % 64 == 0
    assert limit["longer_rows"] == np.count_nonzero(LENGTHS > 128)
    assert limit["tokens_beyond"] == int(np.clip(LENGTHS - 128, 0, None).sum())


def test_rows_as_long_as_the_limit_are_not_longer() -> None:
    assert describe_lengths(np.array([63, 64, 65]), 64)["limit"]["longer_rows"] == 1


def test_rows_of_one_length_need_no_padding() -> None:
    sizes = {"micro_batch_size": 2, "global_batch_size": 4, "seed": 0}
    assert padding_share(np.full(10, 7), **sizes) == 0
    assert padding_share(np.array([1, 3]), **sizes) == pytest.approx(1 - 4 / 6)


@pytest.mark.parametrize(
    "build", [build_tokenizer, build_metaspace_tokenizer, build_wordpiece_tokenizer]
)
def test_stretches_are_the_whole_text_and_mark_its_trained_tokens(
    build: Callable[[], PreTrainedTokenizerBase],
) -> None:
    tokenizer = build()
    row = _tokenized(tokenizer)
    found = segments(row, tokenizer)
    whole = tokenizer.decode(
        row.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert "".join(entry["text"] for entry in found) == whole
    trained = [entry["text"].strip() for entry in found if entry["trained"]]
    ids = row.input_ids[np.asarray(row.loss_mask, dtype=bool)]
    alone = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join("".join(trained).split()) == "".join(str(alone).split())


def test_stretches_of_a_chat_are_its_answers() -> None:
    tokenizer = build_tokenizer()
    found = segments(_tokenized(tokenizer), tokenizer)
    trained = "".join(entry["text"] for entry in found if entry["trained"])
    answers = [message["content"] for message in CHAT if message["role"] == "assistant"]
    assert trained == "".join(f"{answer}<|im_end|>" for answer in answers)
    marks = [entry for entry in found if entry["special"]]
    assert len(marks) == 8
    assert {entry["text"] for entry in marks} == {"<|im_start|>", "<|im_end|>"}


def test_character_on_a_border_is_shown_once() -> None:
    """The bytes of one character, of which only the last carries loss."""
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("one \u4f60", add_special_tokens=False)
    mask = [0] * (len(ids) - 1) + [1]
    found = segments(Row(ids, mask), tokenizer)  # pyright: ignore[reportArgumentType]
    assert [entry["text"] for entry in found] == ["one ", "\u4f60"]


def test_table_of_tokens_names_every_token() -> None:
    tokenizer = build_tokenizer()
    row = _tokenized(tokenizer)
    table = token_table(row, tokenizer)
    assert [entry["id"] for entry in table] == row.input_ids.tolist()
    assert [entry["trained"] for entry in table] == [bool(m) for m in row.loss_mask]
    names = tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
    assert [entry["token"] for entry in table] == names


def test_every_row_is_drawn_as_often() -> None:
    drawn: Counter[int] = Counter()
    for seed in range(2000):
        reservoir: Reservoir[int] = Reservoir(3, seed)
        for item in range(12):
            place = reservoir.place()
            if place is not None:
                reservoir.put(place, item)
        assert reservoir.items == sorted(reservoir.items)
        drawn.update(reservoir.items)
    # 500 each are expected, with a standard deviation of 19.
    assert all(abs(drawn[item] - 500) < 100 for item in range(12))


def test_findings_are_bounded_whatever_rows_say() -> None:
    findings = Findings()
    for number in range(5000):
        name = "abcdefghij"[number % 10] * (1 + number % 97)
        findings.add("bad_row", f"no `{name}`", Place(0, "x", number))
    listed = findings.as_json()
    assert sum(entry["count"] for entry in listed) == findings.count("bad_row") == 5000
    assert len(listed) == MAX_GROUPS + 1
    assert OTHERS in {entry["text"] for entry in listed}
    assert max(len(entry["examples"]) for entry in listed) == MAX_EXAMPLES


def test_roles_that_alternate_are_in_order() -> None:
    def mistakes(*roles: str) -> list[str]:
        return find_role_mistakes([{"role": role} for role in roles])

    assert mistakes("system", "user", "assistant", "tool", "tool", "assistant") == []
    assert mistakes("assistant", "user", "assistant") == [
        "the conversation begins with an assistant message"
    ]
    assert mistakes("user", "system", "assistant") == ["a system message after the first message"]
    assert mistakes("system") == ["a system message only"]
    assert mistakes("user", "tool") == ["a tool message after a user message",
                                        "no assistant message"]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_fingerprints_are_equal_for_equal_words_only(one: str, two: str) -> None:
    import unicodedata

    def words(text: str) -> list[str]:
        return unicodedata.normalize("NFC", text).split()

    same = words(one) == words(two)
    assert (fingerprint({"text": one}) == fingerprint({"text": two})) is same


def _tokenized(tokenizer: PreTrainedTokenizerBase) -> Row:
    options = DataOptions(path="x", format="messages", seq_len=4000)
    [row] = tokenize_rows([{"messages": CHAT}], tokenizer, options).rows
    return row
