"""``format: auto`` finds what the rows are, says why, and refuses what it cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from fsdpq.errors import Problem, RecipeError
from fsdpq.rows.detect import detect_files, detect_format
from fsdpq.rows.examples import made_up_rows
from fsdpq.rows.formats import FORMATS

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def _row(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), "x")


def _problem(*rows: dict[str, Any], **options: Any) -> Problem:
    with pytest.raises(RecipeError) as caught:
        detect_format(rows, source="rows.jsonl", **options)
    [problem] = caught.value.problems
    return problem


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "dummy"])
def test_rows_of_every_format_are_found(name: str) -> None:
    found = detect_format(made_up_rows(name, 4))
    assert found.format == name
    assert all(f"`{column}`" in found.why for column in FORMATS[name].columns)


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        (_row("instruction input output text"), "alpaca", "`text`, which they have too, is not"),
        (_row("instruction context response category"), "alpaca", "`response` as `output`"),
        (_row("query response"), "prompt_completion", "`query` as `prompt` and `response` as"),
        (_row("prompt response"), "prompt_completion", "`prompt` and `response` as `completion`"),
        (_row("question context answer"), "qna", "`question`, `context` and `answer`"),
        (_row("content id"), "text", "`content` as `text`"),
        ({"text": "### Human: a"}, "text", "have `text`"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "prompt_completion", "both lists of messages"),
        ({"messages": [ASK, ANSWER], "prompt": "x"}, "messages", "have `messages`"),
        ({"conversations": [{"from": "human"}], "text": "x"}, "messages", "`conversations` as"),
    ],
)
def test_columns_of_known_datasets_are_told(row: dict[str, Any], name: str, why: str) -> None:
    found = detect_format([row])
    assert found.format == name
    assert why in found.why


def test_bad_rows_do_not_hide_the_format_of_the_others() -> None:
    rows = [_row("question"), {"question": "a", "answer": 4}, _row("question answer")]
    assert detect_format(rows).format == "qna_no_ctx"


def test_two_that_fit_equally_are_both_named() -> None:
    problem = _problem(_row("prompt completion") | {"messages": [ASK, ANSWER]}, key="data.eval.f")
    assert problem.message.startswith(
        "`data.eval.f: auto` cannot choose: row 1 of rows.jsonl fits `messages` and "
        "`prompt_completion`"
    )
    assert problem.key == "data.eval.f"


def test_rows_that_are_not_alike_are_refused() -> None:
    first, second = _row("question context answer"), _row("question answer")
    message = _problem(first, first, second).message
    assert "row 1 of rows.jsonl is `qna`, row 3 of rows.jsonl is `qna_no_ctx`" in message
    with pytest.raises(RecipeError) as caught:
        detect_files({"a": [_row("text")], "b": made_up_rows("guanaco", 2)})
    assert "row 1 of a is `text`, row 1 of b is `guanaco`" in caught.value.problems[0].message
    with pytest.raises(RecipeError) as caught:
        detect_files({"a": [None, first, None, second]})
    assert "row 2 of a is `qna`, row 4 of a is `qna_no_ctx`" in caught.value.problems[0].message
    assert detect_files({"a": [first], "b": [first]}).format == "qna"


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            _row("id system_prompt question response"),
            "prompt_completion` and `columns: {prompt: question}",
        ),
        (_row("prompt chosen rejected"), "prompt_completion` and `columns: {completion: chosen}"),
        (_row("page"), "`format: text` and `columns: {text: page}`"),
        (_row("src tgt"), "`columns: {prompt: src, completion: tgt}`"),
        (_row("input output"), "`columns: {prompt: input, completion: output}`"),
        (_row("question answer_1"), "`columns: {answer: answer_1}`"),
        ({"dialog": [ASK]}, "`format: messages` and `columns: {messages: dialog}`"),
        ({"parts": [{"label": True}]}, "`format: input_output` and `columns: {segments: parts}`"),
        ({"question": "a", "answer": 4}, "as `qna_no_ctx` it has a mistake: `answer` is a number"),
        ({"a": 3}, "`fsdpq kinds data` lists the formats"),
    ],
)
def test_a_near_miss_is_answered_with_what_to_write(row: dict[str, Any], hint: str) -> None:
    problem = _problem(row)
    assert hint in problem.hint
    assert f"for row 1 of rows.jsonl (it has `{next(iter(row))}`" in problem.message


def test_renamed_columns_choose_among_the_formats_that_have_them() -> None:
    row = _row("q a prompt completion")
    assert detect_format([row], {"question": "q", "answer": "a"}).format == "qna_no_ctx"
    renamed = {"messages": "chat", "messages.role": "who"}
    assert detect_format([{"chat": [{"who": "user"}]}], renamed).format == "messages"
    hint = _problem(_row("q b"), columns={"question": "q"}).hint
    assert "`columns: {question: q, answer: b}`" in hint


def test_a_dotted_name_that_leads_to_nothing_is_a_mistake() -> None:
    columns = {"question": "meta.q", "answer": "meta.a"}
    row = {"meta": {"q": "x"}}
    hint = _problem(row, columns=columns).hint
    assert "no `meta.a` in this row, which is `answer`" in hint
    assert detect_format([{"meta": {"q": "x", "a": "y"}}], columns).format == "qna_no_ctx"


def test_no_rows_are_no_format() -> None:
    assert "finds no rows in rows.jsonl" in _problem().message
