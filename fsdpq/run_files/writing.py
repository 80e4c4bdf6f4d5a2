"""Writing files that are whole or not there, and reading lines that may still be written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Writes ``path`` so that a reader sees the old content, or none, or all of the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Makes what was written to ``path``, a file or a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Appends ``row`` to ``path`` as one line of JSON."""
    append_json_lines(path, [row])


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends ``rows`` to ``path`` as lines of JSON: all, or none where the disk refuses."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        before, content = file.tell(), memoryview(lines.encode())
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)
            raise


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the complete lines of ``path``; a last line without its newline is not there yet."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
