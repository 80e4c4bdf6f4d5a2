"""Reads the rows of a data file, torch-free: JSON lines, a JSON list, CSV or parquet by its ending.

Both halves read through this module: the launcher reads every row once, so that a bad one is named
before any rank starts, the ranks read the same rows again. A bad row is yielded with what is wrong
with it instead of raised, so that all of them are reported at once.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import FORMATS, describe_row, find_mistake, named_columns

MAX_PROBLEMS = 20
"""Bad rows that are reported; reading stops there."""

NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})
_MAX_CSV_FIELD = 2**31 - 1
_EXCERPT_CHARACTERS = 160


@dataclass(frozen=True)
class FileRow:
    """One row of a data file.

    Attributes:
        number: its 1-based number among the rows.
        content: its columns; empty where they cannot be read.
        line: the line where it begins, 0 where the file has no lines to speak of.
        mistake: why they cannot, empty where they can.
        text: the line itself, for the excerpt.
    """

    number: int
    content: Mapping[str, Any]
    line: int = 0
    mistake: str = ""
    text: str = ""


def iterate_rows(path: Path, options: DataOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of ``path``, at most ``data.max_rows``, each with its format's columns only.

    Raises:
        RecipeError: the first bad rows (at most `MAX_PROBLEMS`, one where it is the format that is
            wrong) at once, each with its place; also where there are no rows, or the file's ending
            is not known.
    """
    problems: list[Problem] = []
    num_rows = 0
    for row in itertools.islice(read_file(path), options.max_rows):
        num_rows += 1
        mistake = row.mistake or find_mistake(row.content, options.format)
        if mistake:
            problems.append(_problem(path, row, mistake, options))
            wrong_format = not row.mistake and not FORMATS[options.format].fits(row.content)
            if len(problems) == MAX_PROBLEMS or (num_rows == 1 and wrong_format):
                break
        elif not problems:
            yield named_columns(row.content, options.format)
    if num_rows == 0:
        hint = describe_row(options.format)
        problems.append(Problem(f"`{path}` has no rows", "data", Location(str(path)), hint))
    if problems:
        raise RecipeError(problems)


def read_file(path: Path) -> Iterator[FileRow]:
    """Yields the rows of a file, good or not.

    Raises:
        RecipeError: its ending is not known, or it cannot be read as a whole.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(f"`{ending}`" for ending in READERS)
        message = f"`{path}` ends in none of {known}"
        hint = "name the file after what it holds: `.jsonl` is one JSON object a line"
        raise RecipeError([Problem(message, "data.path", Location(str(path)), hint)])
    return reader(path)


def _problem(path: Path, row: FileRow, mistake: str, options: DataOptions) -> Problem:
    message = mistake if row.line else f"row {row.number}: {mistake}"
    location = Location(str(path), row.line, min(row.line, 1), row.text[:_EXCERPT_CHARACTERS])
    return Problem(message, "data", location, describe_row(options.format, row.content))


def _read_json_lines(path: Path) -> Iterator[FileRow]:
    number = 0
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                number += 1
                yield _read_json_line(content, number=number, line=line)


def _read_json_line(content: bytes, *, number: int, line: int) -> FileRow:
    text = content.decode("utf-8", errors="replace").rstrip("\r\n")
    try:
        row: Any = json.loads(content.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        mistake = f"not UTF-8: byte {error.start + 1} of the line"
        return FileRow(number, NO_COLUMNS, line, mistake=mistake, text=text)
    except json.JSONDecodeError as error:
        mistake = f"not JSON: {error.msg} at column {error.colno}"
        return FileRow(number, NO_COLUMNS, line, mistake=mistake, text=text)
    except RecursionError:
        return FileRow(number, NO_COLUMNS, line, mistake="not JSON: nested too deeply", text=text)
    if not isinstance(row, dict):
        return FileRow(number, NO_COLUMNS, line, mistake="not a JSON object", text=text)
    return FileRow(number, cast("dict[str, Any]", row), line, text=text)


def _read_json(path: Path) -> Iterator[FileRow]:
    """Reads a JSON list of objects; a file that starts otherwise is JSON lines by another name."""
    with path.open("rb") as file:
        start = next((line.lstrip()[:1] for line in file if line.strip()), b"")
    if start != b"[":
        yield from _read_json_lines(path)
        return
    try:
        rows: list[Any] = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"is not JSON: {error}", "write a JSON list of objects") from error
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield FileRow(number, cast("dict[str, Any]", row))
        else:
            yield FileRow(number, NO_COLUMNS, mistake="not a JSON object")


def _read_csv(path: Path) -> Iterator[FileRow]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            before = 1
            for number, row in enumerate(reader, start=1):
                line, before = before + 1, reader.line_num
                if None in row:
                    mistake = "more fields than the header has columns"
                    yield FileRow(number, NO_COLUMNS, line, mistake=mistake)
                else:
                    yield FileRow(number, row, line)
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "write comma-separated UTF-8 with a header line"
        raise _unreadable(path, f"is not CSV: {error}", hint) from error


def _read_parquet(path: Path) -> Iterator[FileRow]:
    pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
    parquet: Any = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield FileRow(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, f"is not parquet: {error}", "write the file again") from error


def _unreadable(path: Path, what: str, hint: str) -> RecipeError:
    return RecipeError([Problem(f"`{path}` {what}", "data.path", Location(str(path)), hint)])


READERS: Mapping[str, Callable[[Path], Iterator[FileRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""What reads a file, by its ending."""
