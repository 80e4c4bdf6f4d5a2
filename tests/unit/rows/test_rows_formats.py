"""What a row of each format is, and what is said about one that is not."""

from __future__ import annotations

import typing

import pytest

from fsdpq.recipe.sections.source import Format
from fsdpq.rows.formats import (
    FORMATS,
    describe_row,
    find_mistake,
    fitting_formats,
    made_up_rows,
    named_columns,
    plain_messages,
)

NAMES = typing.get_args(Format)
READ = [name for name in NAMES if name != "dummy"]


def test_every_format_of_the_recipe_is_described() -> None:
    assert set(FORMATS) == set(NAMES)


@pytest.mark.parametrize("name", READ)
def test_made_up_rows_are_rows_of_their_format_and_differ(name: str) -> None:
    rows = made_up_rows(name, 5)
    assert len({str(row) for row in rows}) == 5
    assert [find_mistake(row, name) for row in rows] == [""] * 5
    assert name in fitting_formats(rows[0])


@pytest.mark.parametrize("name", READ)
def test_every_missing_column_is_named(name: str) -> None:
    mistake = find_mistake({"other": "x"}, name)
    for column in FORMATS[name].columns:
        assert f"`{column}`" in mistake
    assert "it has `other`" in mistake


@pytest.mark.parametrize(
    ("columns", "asked", "hint"),
    [
        (["question", "answer"], "qna", "its columns fit `data.format: qna_no_ctx`"),
        (["conversations"], "alpaca", "its columns fit `data.format: messages`"),
        (["text"], "messages", "its columns fit `data.format: guanaco` or `data.format: text`"),
        (["a"], "text", 'a row of `text` reads {"text": "..."}'),
    ],
)
def test_the_hint_names_a_format_that_fits(columns: list[str], asked: str, hint: str) -> None:
    assert describe_row(asked, columns) == hint


def test_sharegpt_is_read_as_messages() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert find_mistake(row, "messages") == ""
    assert plain_messages(named_columns(row, "messages")["messages"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("row", "name", "mistake"),
    [
        ({"messages": []}, "messages", "`messages` is not a list of messages"),
        ({"messages": ["a"]}, "messages", "message 1 is text, not an object"),
        ({"messages": [{"role": "user"}]}, "messages", "message 1 has no text in `content`"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages", "has the role `bot`"),
        ({"question": "a", "answer": 4}, "qna_no_ctx", "`answer` is a number, not text"),
        ({"instruction": "a", "output": None}, "alpaca", "`output` is null, not text"),
        ({"text": "### Human: a"}, "guanaco", "`text` has no `### Assistant:`"),
        ({"text": "Hi ### Human: a"}, "guanaco", "`text` does not begin with `### Human:`"),
    ],
)
def test_what_is_no_text_or_no_message_is_said(row: dict, name: str, mistake: str) -> None:
    assert mistake in find_mistake(row, name)


def test_alpaca_may_lack_its_input() -> None:
    assert find_mistake({"instruction": "a", "output": "b"}, "alpaca") == ""
    assert find_mistake({"instruction": "a", "input": None, "output": "b"}, "alpaca") == ""
