"""Rows of separated values and of plain text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from fsdpq.rows.files.lines import Line, read_lines, too_long
from fsdpq.rows.files.row import MAX_ROW_BYTES, NO_COLUMNS, FileError, FileRow

TEXT_COLUMN = "text"
"""The only column of a plain text's rows."""

_CSV_HINT = "write UTF-8 values with a header line, and quote what holds a separator or a quote"
_NO_COLUMN = object()


class _LineError(ValueError):
    """A line that is no text; the message says why."""


def read_csv(path: Path) -> Iterator[FileRow]:
    """Yields the rows of comma-separated values under a header.

    Raises:
        FileError: there is no usable header, or a row has no end.
    """
    return _read_separated(path, ",")


def read_tsv(path: Path) -> Iterator[FileRow]:
    """The same for tab-separated values."""
    return _read_separated(path, "\t")


def read_text(path: Path) -> Iterator[FileRow]:
    """Yields a row for every line of ``path`` that is not blank: its only column is ``text``."""
    number = 0
    for line in read_lines(path):
        if not line.content.strip():
            continue
        number += 1
        try:
            text = _decode(line).rstrip("\r\n")
        except _LineError as error:
            yield FileRow(number, NO_COLUMNS, line.number, str(error), _excerpt(line))
        else:
            yield FileRow(number, {TEXT_COLUMN: text}, line.number, "", text)


def _read_separated(path: Path, delimiter: str) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    feed = _Feed(path)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    header = _read_header(reader, feed)
    number = 0
    while header:
        feed.start_row()
        fields: list[str] = []
        try:
            fields = next(reader)
            extra = len(fields) - len(header)
            mistake = f"{len(fields)} fields, and the header has {len(header)}" if extra > 0 else ""
        except StopIteration:
            return
        except (csv.Error, _LineError) as error:
            mistake = _explain(error)
        if fields or mistake:
            number += 1
            pairs = zip(header, [*fields, *[None] * len(header)], strict=False)
            content = NO_COLUMNS if mistake else dict(pairs)
            yield FileRow(number, content, feed.row_line, mistake, feed.row_text)


def _read_header(reader: Iterator[list[str]], feed: _Feed) -> list[str]:
    """Returns the names of the columns, none where the file is empty."""
    try:
        header = next((fields for fields in reader if fields), list[str]())
    except (csv.Error, _LineError) as error:
        message = f"has a header that is no line of values: {_explain(error)}"
        raise FileError(message, _CSV_HINT, feed.row_line) from error
    twice = next((name for name in header if header.count(name) > 1), _NO_COLUMN)
    if twice is not _NO_COLUMN:
        message = f"has a header that names the column `{twice}` twice"
        raise FileError(message, "rename one of them", feed.row_line)
    return header


def _explain(error: Exception) -> str:
    if "unexpected end of data" in str(error):
        return "a quote that opens in this row is never closed"
    return str(error) if isinstance(error, _LineError) else f"not CSV: {error}"


class _Feed:
    """Lines as text for a `csv.reader`, which takes several where a quoted field has line ends."""

    def __init__(self, path: Path) -> None:
        self.row_line = 0
        self.row_text = ""
        self._lines = read_lines(path)
        self._size = 0
        self._starts = True

    def start_row(self) -> None:
        """Takes the next line as the first of a row."""
        self._starts = True

    def __iter__(self) -> _Feed:
        """Returns itself, as csv wants it."""
        return self

    def __next__(self) -> str:
        """Returns the next line; raises `_LineError` where it is no text."""
        line = next(self._lines)
        if self._starts:
            self._starts, self._size = False, 0
            self.row_line, self.row_text = line.number, _excerpt(line)
        self._size += len(line.content)
        if self._size > MAX_ROW_BYTES:
            message = f"has in line {self.row_line} a row with a quote that is not closed for "
            message += f"{MAX_ROW_BYTES // 1024**2} MiB"
            raise FileError(message, _CSV_HINT, self.row_line)
        return _decode(line)


def _decode(line: Line) -> str:
    if line.is_too_long:
        raise _LineError(too_long())
    if b"\0" in line.content:
        raise _LineError("a NUL byte: this is no text")
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8: byte {error.start + 1} of the line") from error


def _excerpt(line: Line) -> str:
    return line.content[:400].decode("utf-8", errors="replace").rstrip("\r\n")
