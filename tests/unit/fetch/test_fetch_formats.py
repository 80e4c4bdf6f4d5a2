"""``format: auto`` of files: found for every source, told, and refused where they are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import RecipeError
from fsdpq.fetch.data import fetch_data
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.examples import made_up_rows
from fsdpq.rows.read import read_rows
from fsdpq.rows.source import DataSources


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _fetch(directory: Path, told: list[str], **options: Any) -> DataSources:
    found = DataOptions.model_validate(options)
    return fetch_data(found, base_dir=directory, report=told.append)


def test_every_source_has_its_own_format(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", made_up_rows("alpaca", 3))
    _write(tmp_path / "b.jsonl", [{"chat": row["messages"]} for row in made_up_rows("messages", 3)])
    _write(tmp_path / "e.jsonl", made_up_rows("qna", 3))
    told: list[str] = []
    sources = _fetch(
        tmp_path, told,
        mixture=({"path": "a.jsonl"}, {"path": "b.jsonl", "columns": {"messages": "chat"}}),
        eval={"path": "e.jsonl"},
    )  # fmt: skip
    assert sources.eval is not None
    assert [source.format for source in (*sources.train, sources.eval)] == [
        "alpaca", "messages", "qna",
    ]  # fmt: skip
    assert told == [
        "data.mixture.0.format: alpaca, because its rows have `instruction`, `output` and `input`",
        "data.mixture.1.format: messages, because its rows have `chat` as `messages`",
        "data.eval.format: qna, because its rows have `question`, `context` and `answer`",
    ]
    [row, *_] = read_rows(sources.train[1])
    assert row.content == made_up_rows("messages", 1)[0]


def test_files_of_a_source_have_one_format(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", made_up_rows("alpaca", 3))
    _write(tmp_path / "b.jsonl", made_up_rows("qna", 3))
    with pytest.raises(RecipeError) as caught:
        _fetch(tmp_path, [], path=("a.jsonl", "b.jsonl"))
    [problem] = caught.value.problems
    message = problem.message.replace(f"{tmp_path}/", "")
    assert "row 1 of a.jsonl is `alpaca`, row 1 of b.jsonl is `qna`" in message
    assert problem.key == "data.format"


def test_csv_holds_conversations_and_tools_as_json_text(tmp_path: Path) -> None:
    import csv

    messages = made_up_rows("messages", 1)[0]["messages"]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "tools", "system"], [json.dumps(messages), "", "Be brief."]])
    sources = _fetch(tmp_path, [], path="rows.csv")
    assert sources.train[0].format == "messages"
    [row] = read_rows(sources.train[0])
    assert json.loads(row.content["messages"]) == messages
