"""What a row of each format is, and what is said about one that is not."""

from __future__ import annotations

import typing

import pytest

from fsdpq.recipe.sections.source import Format
from fsdpq.rows.examples import EXAMPLES, made_up_rows
from fsdpq.rows.formats import (
    FORMATS,
    describe_row,
    find_mistake,
    fitting_formats,
    named_columns,
    read_segments,
)

NAMES = [name for name in typing.get_args(Format) if name != "auto"]
READ = [name for name in NAMES if name != "dummy"]


def test_every_format_of_the_recipe_is_described() -> None:
    assert list(FORMATS) == NAMES
    assert set(EXAMPLES) == {*NAMES, "auto"}


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
        (["query", "response"], "qna", "its columns fit `data.format: prompt_completion`"),
    ],
)
def test_the_hint_names_a_format_that_fits(columns: list[str], asked: str, hint: str) -> None:
    assert describe_row(asked, columns) == hint


@pytest.mark.parametrize(
    ("row", "name", "mistake"),
    [
        ({"segments": "a"}, "input_output", "`segments` is not a list of segments"),
        ({"segments": [{"text": "a"}]}, "input_output", "segment 1 has no `label` that is true"),
        ({"segments": [{"label": 1, "text": "a"}]}, "input_output", "segment 1 has no `label`"),
        ({"segments": [{"label": True}]}, "input_output", "segment 1 has no text in `text`"),
        ({"segments": [7]}, "input_output", "segment 1 is a number, not an object"),
        ({"prompt": "a", "completion": []}, "prompt_completion", "`prompt` is not a list of"),
        ({"question": "a", "answer": 4}, "qna_no_ctx", "`answer` is a number, not text"),
        ({"instruction": "a", "output": None}, "alpaca", "`output` is null, not text"),
        ({"text": "### Human: a"}, "guanaco", "`text` has no `### Assistant:`"),
        ({"text": "Hi ### Human: a"}, "guanaco", "`text` does not begin with `### Human:`"),
    ],
)
def test_what_is_no_text_is_said(row: dict, name: str, mistake: str) -> None:
    assert mistake in find_mistake(row, name)


def test_alpaca_may_lack_its_input() -> None:
    assert find_mistake({"instruction": "a", "output": "b"}, "alpaca") == ""
    assert find_mistake({"instruction": "a", "input": None, "output": "b"}, "alpaca") == ""


def test_segments_keep_text_and_flag_also_as_json_text() -> None:
    segments = [{"label": False, "text": "a\n"}, {"label": True, "text": "<s>b"}]
    expected = [("a\n", False), ("<s>b", True)]
    assert read_segments(segments) == expected
    assert read_segments('[{"label": false, "text": "a\\n"}, {"label": true, "text": "<s>b"}]') == (
        expected
    )


def test_columns_are_found_under_the_names_that_the_recipe_gives() -> None:
    row = {"q": "a", "meta": {"reply": {"text": "b"}}, "answer": "unused", "c.d": "e"}
    columns = {"question": "q", "answer": "meta.reply.text"}
    assert named_columns(row, "qna_no_ctx", columns) == {"question": "a", "answer": "b"}
    assert find_mistake(row, "qna_no_ctx", columns) == ""
    assert named_columns(row, "text", {"text": "c.d"}) == {"text": "e"}
    assert "qna_no_ctx" in fitting_formats(row, columns)


def test_fields_of_messages_can_have_other_names() -> None:
    row = {"chat": [{"speaker": "human", "said": {"text": "a"}, "role": "x"}]}
    columns = {"messages": "chat", "messages.role": "speaker", "messages.content": "said.text"}
    [message] = named_columns(row, "messages", columns)["messages"]
    assert (message["role"], message["content"]) == ("human", "a")


@pytest.mark.parametrize(
    ("columns", "mistake"),
    [
        (
            {"question": "question_1"},
            "no `question_1` in this row, which is `question` (it has `quest",
        ),
        ({"question": "question_1"}, "did you mean `question`?"),
        ({"question": "answer.text"}, "no `answer.text` in this row"),
    ],
)
def test_a_renamed_column_that_is_not_there_is_said(columns: dict, mistake: str) -> None:
    assert mistake in find_mistake({"question": "a", "answer": "b"}, "qna_no_ctx", columns)


@pytest.mark.parametrize(
    ("row", "name", "read"),
    [
        ({"query": "a", "response": "b"}, "prompt_completion", {"prompt": "a", "completion": "b"}),
        (
            {"instruction": "a", "context": "", "response": "b"},
            "alpaca",
            {"instruction": "a", "input": "", "output": "b"},
        ),
        ({"content": "a"}, "text", {"text": "a"}),
        ({"conversations": [1]}, "messages", {"messages": [1]}),
    ],
)
def test_other_names_in_wide_use_are_taken(row: dict, name: str, read: dict) -> None:
    assert named_columns(row, name) == read
    own = dict.fromkeys(read, "x")
    assert named_columns(row | own, name) == own


def test_no_other_name_leaves_out_a_column_that_the_row_is_about() -> None:
    row = {"instruction": "a", "input": "b", "output": "c"}
    assert "no `prompt`, `completion`" in find_mistake(row, "prompt_completion")
    assert "no `text`" in find_mistake({"prompt": "a", "completion": "b"}, "text")


def test_a_column_is_read_under_one_name_only() -> None:
    row = {"prompt": "a", "completion": "b", "response": "c"}
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert named_columns(row, "prompt_completion", swapped) == {"prompt": "b", "completion": "a"}
    columns = {"prompt": "completion"}
    assert named_columns(row, "prompt_completion", columns) == {"prompt": "b", "completion": "c"}
    del row["response"]
    assert "no `completion` in this row" in find_mistake(row, "prompt_completion", columns)
    assert not FORMATS["prompt_completion"].fits(row, columns)
