"""Rows of JSON lines, JSON, CSV and parquet files; what is wrong is said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.files import MAX_PROBLEMS, iterate_rows

ROWS = [{"question": "a, ü", "answer": 'b "c"\nd'}, {"question": "e", "answer": "f"}]


def _read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return list(iterate_rows(path, DataOptions(**({"format": "qna_no_ctx"} | options))))


def _problems(path: Path, **options: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        _read(path, **options)
    return caught.value.problems


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text("\n" + json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "parquet"])
def test_every_sort_of_file_gives_the_same_rows_in_order(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"rows.{ending}", [row | {"more": "x"} for row in ROWS])
    assert _read(path) == ROWS
    assert _read(path, max_rows=1) == ROWS[:1]


def test_messages_survive_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    assert _read(_write(tmp_path / "rows.parquet", rows), format="messages") == rows


def test_json_lines_are_read_under_the_name_of_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert _read(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer"', "not JSON: Expecting ':' delimiter at column 27"),
        (b'{"question": "\xff"}', "not UTF-8: byte 15 of the line"),
        (b"[1]", "not a JSON object"),
        (b'{"question": "a", "answer": null}', "`answer` is null, not text"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    [problem] = _problems(path)
    assert problem.message == message
    assert problem.location is not None
    assert (problem.location.source, problem.location.line) == (str(path), 3)


def test_all_bad_rows_are_named_but_not_too_many(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + '{"question": "a"}\n' * 100)
    assert len(_problems(path)) == MAX_PROBLEMS


def test_a_wrong_format_is_said_once_with_the_one_that_fits(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROWS * 10)
    [problem] = _problems(path, format="alpaca")
    message = "no `instruction`, `output` in this row (it has `question`, `answer`)"
    assert problem.message == message
    assert problem.hint == "its columns fit `data.format: qna_no_ctx`"


def test_rows_of_a_file_without_lines_are_named_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], 7, {"question": "a", "answer": 1}]))
    messages = [problem.message for problem in _problems(path)]
    assert messages == ["row 2: not a JSON object", "row 3: `answer` is a number, not text"]


def test_a_csv_row_is_named_by_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a\nb",c\nd,e,f\n')
    [problem] = _problems(path)
    assert problem.message == "more fields than the header has columns"
    assert problem.location is not None
    assert problem.location.line == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[1, ", "is not JSON"),
        ("rows.csv", b"question,answer\na,\xff\n", "is not CSV"),
        ("rows.parquet", b"PAR1", "is not parquet"),
        ("rows.xlsx", b"", "ends in none of `.jsonl`, `.ndjson`, `.json`, `.csv`, `.parquet`"),
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.json", b"", "has no rows"),
        ("rows.json", b"[]", "has no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in _problems(tmp_path / name)[0].message
