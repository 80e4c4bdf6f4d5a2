"""One row as it stands in a file, and what is said of a file that cannot be read as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

MAX_ROW_BYTES = 64 * 1024**2
"""A longer row is a mistake; it is never held in memory."""

NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})


class FileRow(NamedTuple):
    """One row of a data file.

    Attributes:
        number: its 1-based number among the rows of the file.
        content: its columns; empty where they cannot be read.
        line: the line where it begins, 0 where the file has no lines to speak of.
        mistake: why they cannot, empty where they can.
        text: the line itself, for the excerpt; empty where a line is no row.
    """

    number: int
    content: Mapping[str, Any]
    line: int = 0
    mistake: str = ""
    text: str = ""


class FileError(Exception):
    """A file that cannot be read as a whole.

    Attributes:
        message: what is wrong, without the file's name: ``is not parquet: ...``.
        hint: what to do.
        line: where, 0 where there is no place to name.
    """

    def __init__(self, message: str, hint: str, line: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.line = line
