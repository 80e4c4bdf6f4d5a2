"""Rows of JSON lines, and of a JSON list, which is decoded piece by piece and never held whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsdpq.rows.files.lines import BOM, check_is_text, open_bytes, read_lines, too_long
from fsdpq.rows.files.row import MAX_ROW_BYTES, NO_COLUMNS, FileError, FileRow

_CHUNK_BYTES = 1024 * 1024
_MAX_CHUNK_BYTES = 16 * _CHUNK_BYTES
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\[uU][dD][89a-fA-F]")
_OPEN_OBJECT = re.compile(rb"\{([^\r\n]*[\[{,:])?[ \t]*\r?\n")
"""A first line that goes on in the next one, as no line of JSON lines does."""

_NOT_JSON = "not JSON"
_LONGEST_WORD = 16
"""A decoder that stops so close to the end of what was read may only lack the rest of a word."""


def read_json_lines(path: Path) -> Iterator[FileRow]:
    """Yields a row for every line of ``path`` that is not blank."""
    number = 0
    for line in read_lines(path):
        if line.is_too_long:
            number += 1
            text = line.content.decode("utf-8", errors="replace")
            yield FileRow(number, NO_COLUMNS, line.number, too_long(), text)
        elif line.content and not line.content.isspace():
            number += 1
            yield _read_json_line(line.content, number=number, line=line.number)


def count_json_lines(path: Path) -> int:
    """Returns how many rows `read_json_lines` yields."""
    return sum(1 for line in read_lines(path) if line.content and not line.content.isspace())


def read_json(path: Path) -> Iterator[FileRow]:
    """Yields the rows of a JSON list; a file that starts otherwise is JSON lines by another name.

    Raises:
        FileError: the list is not JSON, or the file is one object over several lines.
    """
    with open_bytes(path) as file:
        start = file.read(_CHUNK_BYTES)
    check_is_text(start)
    start = start.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        yield from _read_list(path)
        return
    if _OPEN_OBJECT.match(start):
        hint = "write a list of objects, or one object a line as `.jsonl`; a list inside of it "
        hint += f"comes out with `jq -c '.data[]' {path.name} > rows.jsonl`"
        raise FileError("is one JSON object over several lines, not a list", hint, 1)
    yield from read_json_lines(path)


def _read_json_line(content: bytes, *, number: int, line: int) -> FileRow:
    try:
        text = content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        text = content.decode("utf-8", errors="replace").rstrip("\r\n")
        mistake = f"not UTF-8: byte {error.start + 1} of the line"
        return FileRow(number, NO_COLUMNS, line, mistake, text)
    row: Any = None
    try:
        row = json.loads(text)
        mistake = "" if isinstance(row, dict) else "not a JSON object"
    except json.JSONDecodeError as error:
        mistake = f"{_NOT_JSON}: {error.msg.removesuffix(' at')} at column {error.colno}"
        mistake += " (a NUL byte)" if text[error.pos : error.pos + 1] == "\0" else ""
    except RecursionError:
        mistake = f"{_NOT_JSON}: nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        mistake = f"{_NOT_JSON} that Python reads: {error}"
    if not mistake and _SURROGATE.search(text):
        mistake = _find_half_character(row)
    if mistake:
        return FileRow(number, NO_COLUMNS, line, mistake, text)
    return FileRow(number, cast("dict[str, Any]", row), line, "", text)


def _find_half_character(row: Any) -> str:
    r"""Returns a mistake where a text holds half of a pair like ``\ud83d\ude00``: no character."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:
        half = error.object[error.start] if isinstance(error, UnicodeEncodeError) else ""
        return f"half of a character: `\\u{ord(half):04x}` alone" if half else "nested too deeply"
    return ""


def _read_list(path: Path) -> Iterator[FileRow]:
    with open_bytes(path) as file:
        text = _GrowingText(file)
        text.expect("[")
        is_open = text.peek() != "]"
        while is_open:
            value, line = text.decode()
            mistake = "" if isinstance(value, dict) else "not a JSON object"
            if not mistake and text.has_surrogates:
                mistake = _find_half_character(value)
            content = NO_COLUMNS if mistake else cast("dict[str, Any]", value)
            yield FileRow(text.num_values, content, line, mistake)
            is_open = text.peek() != "]"
            if is_open:
                text.expect(",")
        text.expect("]")
        if rest := text.peek():
            raise text.error(f"`{rest}` follows its list")


class _GrowingText:
    """The text of a file, of which only a chunk and the value being read are held."""

    def __init__(self, file: BinaryIO) -> None:
        self.has_surrogates = False
        self.num_values = 0
        self._file = file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._line = 1
        self._counted = 0
        self._at_end = False

    def error(self, what: str) -> FileError:
        """Returns the error for a list that is wrong at this place."""
        return FileError(f"is {_NOT_JSON}: {what}", "write a JSON list of objects", self._line_at())

    def peek(self) -> str:
        """Returns the next character that is no white space, empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def expect(self, character: str) -> None:
        """Takes ``character``, or raises."""
        found = self.peek()
        if found != character:
            what = f"`{found}` follows" if found else "the file ends after"
            raise self.error(f"{what} item {self.num_values} instead of `{character}`")
        self._at += 1

    def decode(self) -> tuple[Any, int]:
        """Takes one value and returns it with the line where it begins."""
        self.peek()
        line = self._line_at()
        self.num_values += 1
        while True:
            why = ""
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._at_end:
                    self._at = end
                    return value, line
            except json.JSONDecodeError as error:
                why = f"{error.msg.removesuffix(' at')} in item {self.num_values}"
                near_end = error.pos >= len(self._text) - _LONGEST_WORD
                if not (near_end or error.msg.startswith("Unterminated string")):
                    raise self.error(why) from error
            except (RecursionError, ValueError) as error:  # too deep, or a number too long
                raise self.error(f"item {self.num_values}: {error}") from error
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise self.error(too_long(f"item {self.num_values}"))
            if not self._read_more() and why:
                raise self.error(why)

    def _line_at(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _read_more(self) -> bool:
        """Reads about as much again as is held: a long value is not scanned for each chunk."""
        if self._at_end:
            return False
        self._line_at()
        held = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK_BYTES, min(len(held), _MAX_CHUNK_BYTES)))
        self._at_end = not chunk
        try:
            new = self._decode_bytes(chunk, self._at_end)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error.reason}") from error
        self.has_surrogates = self.has_surrogates or bool(_SURROGATE.search(held[-8:] + new))
        self._text, self._at, self._counted = held + new, 0, 0
        return True
