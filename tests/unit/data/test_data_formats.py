"""Reading rows: what is wrong is said with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdpq.data.formats import read_conversations
from fsdpq.errors import RecipeError

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_conversations_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    other = {"messages": [{"role": "user", "content": "ü"}]}
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(other)}\n", encoding="utf-8")
    assert read_conversations(path) == [GOOD["messages"], other["messages"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ('{"text": "a"}', "no `messages` in this row (it has: text)"),
        ('{"messages": []}', "`messages` is not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text in `content`"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "has the role `human`"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        read_conversations(path)
    [problem] = caught.value.problems
    assert message in problem.message
    assert problem.location is not None
    assert problem.location.line == 2


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(RecipeError) as caught:
        read_conversations(path)
    assert "has no rows" in caught.value.problems[0].message
