"""Which reader a file has, by its ending."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from fsdpq.rows.files.arrow_rows import count_arrow, count_parquet, read_arrow, read_parquet
from fsdpq.rows.files.json_rows import count_json_lines, read_json, read_json_lines
from fsdpq.rows.files.lines import COMPRESSIONS
from fsdpq.rows.files.row import FileError, FileRow
from fsdpq.rows.files.text_rows import read_csv, read_text, read_tsv

READERS: Mapping[str, Callable[[Path], Iterator[FileRow]]] = MappingProxyType(
    {
        ".jsonl": read_json_lines,
        ".ndjson": read_json_lines,
        ".json": read_json,
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".parquet": read_parquet,
        ".arrow": read_arrow,
        ".txt": read_text,
    }
)
"""What reads a file, by its ending."""

_COUNTERS: Mapping[str, Callable[[Path], int]] = MappingProxyType(
    {
        ".jsonl": count_json_lines,
        ".ndjson": count_json_lines,
        ".parquet": count_parquet,
        ".arrow": count_arrow,
    }
)

PACKED: tuple[str, ...] = (".parquet", ".arrow")
"""Endings of files that hold their own compression."""


def kind_of(path: Path) -> str | None:
    """Returns the ending that chooses the reader of ``path``, None where none does."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
        if endings and endings[-1] in PACKED:
            return None
    return endings[-1] if endings and endings[-1] in READERS else None


def read_file(path: Path) -> Iterator[FileRow]:
    """Yields the rows of a file, good or not.

    Raises:
        FileError: its ending is not known, or it cannot be read as a whole.
    """
    kind = kind_of(path)
    if kind is None:
        known = ", ".join(f"`{ending}`" for ending in READERS)
        hint = "name the file after what it holds: `.jsonl` is one JSON object a line"
        if path.suffix.lower() in COMPRESSIONS:
            hint = "only text may be compressed, and its name says what it is: `rows.jsonl.gz`"
        raise FileError(f"ends in none of {known}", hint)
    with _explained(path):
        yield from READERS[kind](path)


def count_file_rows(path: Path) -> int:
    """Returns how many rows `read_file` yields, without looking into them where that is possible.

    Raises:
        FileError: as `read_file`.
    """
    counter = _COUNTERS.get(kind_of(path) or "")
    if counter is None:
        return sum(1 for _ in read_file(path))
    with _explained(path):
        return counter(path)


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """Turns what the system and decompression raise into `FileError`."""
    try:
        yield
    except PermissionError as error:
        hint = "make it readable for this user (`chmod u+r`)"
        raise FileError(f"cannot be read: {error.strerror}", hint) from error
    except (OSError, EOFError) as error:  # damaged compression is an OSError or an EOFError
        raise _unreadable(path, error) from error
    except Exception as error:
        if type(error).__module__ in ("zlib", "_lzma", "lzma"):
            raise _unreadable(path, error) from error
        raise


def _unreadable(path: Path, error: Exception) -> FileError:
    if path.suffix.lower() in COMPRESSIONS:
        message = f"cannot be decompressed: {error}"
        return FileError(message, "it is truncated or damaged: copy or compress it again")
    return FileError(f"cannot be read: {error}", "copy it again, or name another file")
