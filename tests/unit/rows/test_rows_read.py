"""Reading a source: bad rows counted or refused, mixed rows, huge rows, damaged bytes."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from fsdpq.errors import Problem, RecipeError
from fsdpq.rows.read import check_rows, check_source, count_rows, read_rows
from fsdpq.rows.source import RowSource, SourceFile

GOOD = '{"question": "a", "answer": "b"}\n'
MIB = 1024**2


def source_of(*paths: Path, **fields: Any) -> RowSource:
    files = tuple(SourceFile(path, "") for path in paths)
    given: dict[str, Any] = {"format": "qna_no_ctx", "num_rows": 0, **fields}
    return RowSource(str(paths[0]), files, **given)


def _problems(source: RowSource, on_bad_row: Any = "error") -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        check_source(source, on_bad_row=on_bad_row)
    return caught.value.problems


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [GOOD, "{\n", "\n", '{"question": "c"}\n', GOOD.replace('"a"', '"x"'), "[]\n", GOOD]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    source = source_of(tmp_path / "rows.jsonl")
    checked, note = check_source(source, on_bad_row="skip")
    assert (checked.num_rows, checked.num_bad_rows) == (3, 3)
    assert note.startswith("3 of 6 rows are bad and left out: line 2 of rows.jsonl: not JSON")
    assert note.endswith(", and 2 more")
    found = [(row.number, row.line) for row in read_rows(source, on_bad_row="skip")]
    assert found == [(1, 1), (4, 5), (6, 7)]
    assert check_source(source_of(tmp_path / "rows.jsonl", max_rows=1))[0].num_rows == 1
    problems = _problems(source)
    assert [problem.location and problem.location.line for problem in problems] == [2, 4, 6]


def test_max_rows_counts_good_rows_and_a_slice_counts_all(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + "{\n" + GOOD + GOOD)
    for fields, expected in (({"max_rows": 2}, [1, 3]), ({"split": "train[:2]"}, [1])):
        source = source_of(tmp_path / "rows.jsonl", **fields)
        assert [row.number for row in read_rows(source, on_bad_row="skip")] == expected
        assert check_source(source, on_bad_row="skip")[0].num_rows == len(expected)


def test_a_file_of_mostly_bad_rows_stays_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 5 + "{\n" * 5)
    assert check_source(source_of(path), on_bad_row="skip")[0].num_bad_rows == 5
    path.write_text(GOOD * 5 + "{\n" * 6)
    problems = _problems(source_of(path), "skip")
    assert f"6 of 11 rows of `{path}` are bad: too many to leave out" in problems[-1].message
    assert "check `format`" in problems[-1].hint
    path.write_text(GOOD * 4 + "{\n" * 5)
    assert check_source(source_of(path), on_bad_row="skip")[0].num_rows == 4, "few rows"
    path.write_text("{\n" * 3)
    assert "has no good rows" in _problems(source_of(path), "skip")[-1].message


def test_rows_of_two_sorts_are_named_one_of_each(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 3)
    (tmp_path / "b.jsonl").write_text('{"instruction": "c", "output": "d"}\n' * 4)
    [problem] = _problems(source_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert problem.message == (
        "no `question`, `answer` in this row (it has `instruction`, `output`) (3 more rows like it)"
    )
    assert problem.hint == (
        "rows differ: line 1 of a.jsonl has `question`, `answer`; make them alike, or give "
        "each sort a part of `data.mixture`"
    )
    assert problem.location is not None
    assert (problem.location.source, problem.location.line) == (str(tmp_path / "b.jsonl"), 1)


def test_parquet_files_of_two_schemas_are_named(tmp_path: Path) -> None:
    rows: list[list[dict[str, Any]]] = [[{"question": "a", "answer": "b"}], [{"answer": 5}]]
    for name, part in zip("ab", rows, strict=True):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    [problem] = _problems(source_of(tmp_path / "a.parquet", tmp_path / "b.parquet"))
    assert problem.message == "row 1: no `question` in this row (it has `answer`)"
    assert problem.hint.startswith("rows differ: row 1 of a.parquet has")


def test_a_misspelt_column_has_its_line_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"quesstion": "a", "annswer": "b"}\n')
    [problem] = _problems(source_of(tmp_path / "rows.jsonl"))
    assert problem.hint == (
        "if it is another name, write `columns: {question: quesstion, answer: annswer}`"
    )


def test_columns_have_other_names_and_must_be_somewhere(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "reply": "b", "output": "no"}\n')
    columns = {"output": "reply"}
    source = source_of(tmp_path / "rows.jsonl", format="alpaca", columns=columns)
    [row] = read_rows(source)
    assert row.content == {"instruction": "a", "output": "b"}
    columns["input"] = "contxt"
    [problem] = _problems(source_of(tmp_path / "rows.jsonl", format="alpaca", columns=columns))
    assert problem.key == "data.columns.input"
    assert problem.message == "`data.columns.input: contxt`: no row has this column"


def test_a_damaged_value_of_a_table_is_one_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        source = source_of(tmp_path / name, format="text")
        [problem] = _problems(source)
        assert problem.message == "row 2: a text that is not UTF-8"
        assert check_source(source, on_bad_row="skip")[0].num_rows == 2


HUGE = """
import sys
from pathlib import Path
from fsdpq.errors import RecipeError
from fsdpq.rows.read import read_rows
from fsdpq.rows.source import RowSource, SourceFile
path = Path(sys.argv[1])
source = RowSource("x", (SourceFile(path, ""),), "text", 0)
def peak_kib():  # the process's own: ru_maxrss begins with that of the process that forked it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak_kib()
try:
    print(sum(1 for _ in read_rows(source, on_bad_row=sys.argv[2])))
except RecipeError as error:
    print(error.problems[0].message)
print((peak_kib() - before) // 1024)
"""


@pytest.mark.parametrize(
    ("name", "size", "start", "message"),
    [
        ("rows.jsonl", 1024, b'{"text": "', "the line is longer than 64 MiB"),
        ("rows.json", 200, b'[{"text": "', "item 1 is longer than 64 MiB"),
        ("rows.csv", 200, b'text\n"', "the line is longer than 64 MiB"),
        ("rows.txt", 200, b"a", "the line is longer than 64 MiB"),
    ],
)
def test_a_row_of_a_gigabyte_is_named_and_never_held(
    tmp_path: Path, name: str, size: int, start: bytes, message: str
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(start)
        if name == "rows.json":  # zeros are no JSON text: they would be refused at once
            file.write(b"a" * (90 * MIB))
        file.truncate(size * MIB)  # the rest has no blocks on the disk
        file.seek(0, 2)
        file.write(b'\n{"text": "b"}\n')
    command = [sys.executable, "-c", HUGE, str(path), "error"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said, grown = done.stdout.splitlines()
    assert message in said
    assert int(grown) < 260, "MiB: the longest row that is read, its copies, no more"


def test_rows_after_one_of_a_gigabyte_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(80 * MIB)
        file.seek(0, 2)
        file.write(b'\n{"text": "b"}\n')
    source = source_of(path, format="text")
    assert [row.line for row in read_rows(source, on_bad_row="skip")] == [2]


def _valid_files() -> dict[str, bytes]:
    rows = [{"question": 'é \\ "q"', "answer": f"{i}"} for i in range(3)]
    table = pyarrow.Table.from_pylist(rows)
    files = {
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        "rows.json": json.dumps(rows, indent=1).encode(),
        "rows.csv": b'question,answer\n"a\nb","c ""d"""\ne,f\n',
        "rows.txt": "é\nb\n".encode(),
    }
    files["rows.jsonl.gz"] = gzip.compress(files["rows.jsonl"])
    files["rows.jsonl.zst"] = pyarrow.compress(files["rows.jsonl"], "zstd", asbytes=True)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    files["rows.parquet"] = sink.getvalue().to_pybytes()
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    files["rows.arrow"] = sink.getvalue().to_pybytes()
    return files


VALID = _valid_files()


def test_an_arrow_file_that_lies_about_its_texts_is_not_believed(tmp_path: Path) -> None:
    true, lie = struct.pack("<4i", 0, 1, 2, 3), struct.pack("<4i", 0, 1, 2, 2**30)
    assert true in VALID["rows.arrow"]
    (tmp_path / "rows.arrow").write_bytes(VALID["rows.arrow"].replace(true, lie))
    [problem] = _problems(source_of(tmp_path / "rows.arrow"))
    assert problem.message.startswith("row 3: a value that Python cannot hold")


PIECES = [b"", b"\0", b"\xff", b'"', b"[", b"{", b"}", b",", b"\n", b"\r", b"\\ud800", b"1e999",
          b"NaN", b"9" * 5000, b"[" * 2000, b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b"]  # fmt: skip


@given(
    name=st.sampled_from(sorted(VALID)),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 0.2)),
    piece=st.one_of(st.sampled_from(PIECES), st.binary(max_size=40)),
    whole=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_rows_or_problems(
    name: str, cuts: tuple[float, float], piece: bytes, whole: bool
) -> None:
    content = VALID[name]
    start = int(cuts[0] * len(content))
    damaged = content[:start] + piece + content[start + int(cuts[1] * len(content)) :]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(piece if whole else damaged)
        source = source_of(path, format="text" if name == "rows.txt" else "qna_no_ctx")
        for on_bad_row in ("error", "skip"):
            rows, problems = _outcome(source, on_bad_row)
            assert all(problem.hint and problem.message for problem in problems)
            if not problems:
                good = [row.content for row in check_rows(source) if not row.mistake]
                assert rows == good
                assert count_rows(source) == sum(1 for _ in check_rows(source))
            json.dumps(rows, ensure_ascii=False).encode()


def _outcome(source: RowSource, on_bad_row: Any) -> tuple[list[Any], list[Problem]]:
    try:
        return [row.content for row in read_rows(source, on_bad_row=on_bad_row)], []
    except RecipeError as error:
        return [], error.problems


def test_a_message_quotes_no_more_of_a_row_than_a_line(tmp_path: Path) -> None:
    row = {"messages": [{"role": "x" * MIB, "content": "a"}], "more": "y" * MIB}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [problem] = _problems(source_of(tmp_path / "rows.jsonl", format="messages"))
    assert problem.location is not None
    assert len(problem.message) + len(problem.hint) + len(problem.location.text) < 2000
