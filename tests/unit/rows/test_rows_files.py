"""Rows of every sort of file; what is wrong is said with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from fsdpq.errors import Problem, RecipeError
from fsdpq.rows.files import json_rows, text_rows
from fsdpq.rows.mistakes import MAX_PROBLEMS
from fsdpq.rows.read import count_rows, read_rows
from fsdpq.rows.source import RowSource, SourceFile

ROWS = [{"question": "a, ü", "answer": 'b "c"\nd'}, {"question": "e", "answer": "f"}]
KINDS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow"]


def source_of(*paths: Path, **fields: Any) -> RowSource:
    files = tuple(SourceFile(path, "") for path in paths)
    return RowSource(str(paths[0]), files, **({"format": "qna_no_ctx", "num_rows": 0} | fields))


def _read(path: Path, **fields: Any) -> list[dict[str, Any]]:
    return [row.content for row in read_rows(source_of(path, **fields))]


def _problems(path: Path, **fields: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        _read(path, **fields)
    return caught.value.problems


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".json":
        path.write_text("\n" + json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("ending", KINDS)
def test_every_sort_of_file_gives_the_same_rows_in_order(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path / f"rows.{ending}", [row | {"more": "x"} for row in ROWS])
    assert _read(path) == ROWS
    assert _read(path, max_rows=1) == ROWS[:1]
    assert _read(path, split="train[1:]") == ROWS[1:]
    assert count_rows(source_of(path)) == 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_text_may_be_compressed(tmp_path: Path, kind: str, packed: str) -> None:
    content = _write(tmp_path / f"rows.{kind}", ROWS).read_bytes()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pack["zst"] = lambda data: pyarrow.compress(data, "zstd", asbytes=True)
    path = tmp_path / f"rows.{kind}.{packed.upper()}"
    path.write_bytes(pack[packed](content))
    assert _read(path) == ROWS
    path.write_bytes(pack[packed](content)[:-9])
    [problem] = _problems(path)
    assert f"`{path}` cannot be decompressed" in problem.message


def test_an_arrow_stream_is_read_like_a_file(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS * 2000)
    with ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert _read(tmp_path / "rows.arrow") == ROWS * 2000


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_bytes("\ufeffeins\r\n\n  zwei \n".encode())
    assert _read(tmp_path / "rows.txt", format="text") == [{"text": "eins"}, {"text": "  zwei "}]


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
        (b'{"question": "a\0"}', "not JSON: Invalid control character at column 16 (a NUL byte)"),
        (b'{"answer": 1' + b"0" * 5000 + b"}", "not JSON that Python reads: Exceeds the limit"),
        (b'{"answer": "\\uD83d"}', "half of a character: `\\ud83d` alone"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    [problem] = _problems(path)
    assert problem.message.startswith(message)
    assert problem.location is not None
    assert (problem.location.source, problem.location.line) == (str(path), 3)


def test_whole_characters_of_two_halves_are_fine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "\\ud83d\\ude00", "answer": "b"}')
    assert _read(tmp_path / "rows.jsonl") == [{"question": "\U0001f600", "answer": "b"}]


def test_mistakes_are_said_once_each_and_not_too_many(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]) + "\n"
    path.write_text(good + '{"question": "a"}\n' * 100 + "{\n")
    problems = _problems(path)
    assert [problem.location and problem.location.line for problem in problems] == [2, 102]
    assert problems[0].message.endswith("(it has `question`) (99 more rows like it)")
    path.write_text(good + "".join("{" + " " * n + "\n" for n in range(100)))
    assert len(_problems(path)) == MAX_PROBLEMS


def test_a_wrong_format_is_said_once_with_the_one_that_fits(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROWS * 10)
    [problem] = _problems(path, format="alpaca")
    message = "no `instruction`, `output` in this row (it has `question`, `answer`)"
    assert problem.message == message
    assert problem.hint == "its columns fit `data.format: qna_no_ctx`"


def test_rows_of_a_json_list_are_named_by_their_number_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], 7, {"question": "a", "answer": 1}], indent=0))
    problems = _problems(path)
    messages = [problem.message for problem in problems]
    assert messages == ["row 2: not a JSON object", "row 3: `answer` is a number, not text"]
    assert [problem.location and problem.location.line for problem in problems] == [6, 7]


@pytest.mark.parametrize("chunk", [2, 3, 5, 7, 64, 4096])
def test_a_json_list_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    items: list[Any] = [{"a": "é\u2028\n\\", "b": [1.5e300, None, {}]}, 12345678, "x, ]", True]
    items += [-0.25, [], {"c": "\U0001f600" * 50}, {}]
    for text in (json.dumps(items), json.dumps(items, indent=2, ensure_ascii=False)):
        (tmp_path / "rows.json").write_text(f" {text}\n", encoding="utf-8")
        rows = list(json_rows.read_json(tmp_path / "rows.json"))
        assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
        expected = [item if isinstance(item, dict) else {} for item in items]
        assert [dict(row.content) for row in rows] == expected
        assert all(row.text == "" for row in rows)


def test_the_bound_is_on_a_csv_row_and_not_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW_BYTES", 40)
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "a,b\n" * 30)
    assert len(_read(path)) == 30
    path.write_text("question,answer\n" + '"a\n' + "a\n" * 30)
    [problem] = _problems(path)
    assert "has in line 2 a row with a quote that is not closed for" in problem.message


@pytest.mark.parametrize(
    ("bad", "line", "message"),
    [
        ("d,e,f\n", 4, "3 fields, and the header has 2"),
        ('g,"h\ni\n', 4, "a quote that opens in this row is never closed"),
        ('"j"k,l\n', 4, "not CSV: ',' expected after '\"'"),
        ("m,\0\n", 4, "a NUL byte: this is no text"),
        ("o,\udcff\n", 4, "not UTF-8: byte 3 of the line"),
        ("p\n", 4, "`answer` is null, not text"),
    ],
)
def test_a_bad_csv_row_is_named_by_the_line_where_it_begins(
    tmp_path: Path, bad: str, line: int, message: str
) -> None:
    path = tmp_path / "rows.csv"
    text = f'question,answer\n"a\nb",c\n{bad}'
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    [problem] = _problems(path)
    assert problem.message == message
    assert problem.location is not None
    assert problem.location.line == line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[", "is not JSON: Expecting value in item 1"),
        (
            "rows.json",
            b'[{"question": "a", "answer": "b"}',
            "is not JSON: the file ends after item 1 instead of `,`",
        ),
        ("rows.json", b'[{"question": "a", "answer": "b"}] x', "is not JSON: `x` follows its list"),
        ("rows.json", b'[{"a": "\xff"}]', "is not JSON: not UTF-8"),
        ("rows.json", b'{\n"data": []}', "is one JSON object over several lines, not a list"),
        ("rows.json", b'{"data": [\n{}]}', "is one JSON object over several lines, not a list"),
        ("rows.csv", b"question,question\n", "has a header that names the column `question` twice"),
        ("rows.csv", b"question,\xff\n", "has a header that is no line of values: not UTF-8"),
        ("rows.csv", "q,a\n".encode("utf-16"), "is UTF-16 text, not UTF-8"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "is compressed by gzip"),
        ("rows.jsonl", b"PAR1", "is parquet by its content"),
        ("rows.jsonl.gz", b"{}", "cannot be decompressed"),
        ("rows.parquet", b"PAR1", "is not parquet, or is damaged"),
        ("rows.arrow", b"ARROW1\0\0", "is not an Arrow file, or is damaged"),
        ("rows.arrow", b"{}", "is not an Arrow file, or is damaged"),
        ("rows.xlsx", b"", "ends in none of `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`"),
        ("rows.parquet.gz", b"", "ends in none of"),
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.csv", b"", "has no rows"),
        ("rows.csv", b"question,answer\n", "has no rows"),
        ("rows.arrow", b"", "has no rows"),
        ("rows.json", b"", "has no rows"),
        ("rows.json", b"[]", "has no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    [problem] = _problems(tmp_path / name)
    assert message in problem.message
    assert problem.hint
