"""Bytes and lines of text files, compressed or not; a line that is too long is never held.

Zstandard is read by pyarrow, which is there anyway; the other compressions by Python itself.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from fsdpq.rows.files.row import MAX_ROW_BYTES, FileError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Second endings of text files."""

BOM = b"\xef\xbb\xbf"
EXCERPT_BYTES = 400
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_BUFFER_BYTES = 256 * 1024
_RECODE = "`iconv -f UTF-16 -t UTF-8 FILE > NEW` converts it"
_CONTENTS: Mapping[bytes, tuple[str, str]] = MappingProxyType(
    {
        b"\xff\xfe": ("is UTF-16 text, not UTF-8", _RECODE),
        b"\xfe\xff": ("is UTF-16 text, not UTF-8", _RECODE),
        b"\x1f\x8b": ("is compressed by gzip", "let its name end in `.gz`"),
        b"\x28\xb5\x2f\xfd": ("is compressed by zstd", "let its name end in `.zst`"),
        b"BZh": ("is compressed by bzip2", "let its name end in `.bz2`"),
        b"\xfd7zXZ\x00": ("is compressed by xz", "let its name end in `.xz`"),
        b"PK\x03\x04": ("is a zip archive", "unpack it"),
        b"PAR1": ("is parquet by its content", "let its name end in `.parquet`"),
        b"ARROW1": ("is an Arrow file by its content", "let its name end in `.arrow`"),
        b"version https://git-lfs": (
            "is a pointer of Git LFS, not the rows themselves", "run `git lfs pull` where it is",
        ),
    }
)  # fmt: skip
"""How files begin that are something else than their name says -> what is said of them."""


class Line(NamedTuple):
    """One line of a file.

    Attributes:
        number: from 1.
        content: its bytes with the line end; the first `EXCERPT_BYTES` of one that is too long.
        is_too_long: more than `MAX_ROW_BYTES`.
    """

    number: int
    content: bytes
    is_too_long: bool


def open_bytes(path: Path) -> BinaryIO:
    """Opens ``path`` for reading, decompressed where its ending says that it is compressed."""
    ending = path.suffix.lower()
    if ending == ".zst":
        pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
        file = path.open("rb")
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _BUFFER_BYTES)
    if ending in _MODULES:
        unpacked: Any = importlib.import_module(_MODULES[ending]).open(path, "rb")
        return io.BufferedReader(unpacked, _BUFFER_BYTES)
    return path.open("rb", buffering=_BUFFER_BYTES)


def read_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of ``path``, without a byte order mark of UTF-8.

    Raises:
        FileError: it is no text file by its first bytes.
    """
    with open_bytes(path) as file:
        number = 0
        while content := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                check_is_text(content)
                content = content.removeprefix(BOM)
            if len(content) > MAX_ROW_BYTES and not content.endswith(b"\n"):
                content = content[:EXCERPT_BYTES]
                _skip_line(file)
                yield Line(number, content, is_too_long=True)
            else:
                yield Line(number, content, is_too_long=False)


def check_is_text(start: bytes) -> None:
    """Raises `FileError` where a file that begins with ``start`` is of another sort."""
    for magic, (what, hint) in _CONTENTS.items():
        if start.startswith(magic):
            raise FileError(what, hint)


def too_long(what: str = "the line") -> str:
    """Returns what is said of a row that is longer than `MAX_ROW_BYTES`."""
    return f"{what} is longer than {MAX_ROW_BYTES // 1024**2} MiB"


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(_BUFFER_BYTES)) and not rest.endswith(b"\n"):
        pass
