"""Rows of parquet and Arrow files, a batch at a time; the one caller of pyarrow's tables.

No threads of pyarrow's: processes that were forked read through here as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdpq.rows.files.row import NO_COLUMNS, FileError, FileRow

BATCH_ROWS = 1024
_FILE_MAGIC = b"ARROW1"


def read_parquet(path: Path) -> Iterator[FileRow]:
    """Yields the rows of a parquet file; memory holds a row group.

    Raises:
        FileError: it is no parquet, or damaged.
    """
    with _open_parquet(path) as file:
        yield from _read_batches(file.iter_batches(BATCH_ROWS, use_threads=False))


def count_parquet(path: Path) -> int:
    """Returns the rows of a parquet file by its metadata; raises as `read_parquet`."""
    with _open_parquet(path) as file:
        return file.metadata.num_rows


def read_arrow(path: Path) -> Iterator[FileRow]:
    """Yields the rows of an Arrow file or stream, as ``datasets`` saves them; memory holds a batch.

    Raises:
        FileError: it is neither, or damaged.
    """
    with _open_arrow(path) as batches:
        yield from _read_batches(_small(batches))


def count_arrow(path: Path) -> int:
    """Returns the rows of an Arrow file by the lengths of its batches; raises as `read_arrow`."""
    with _open_arrow(path) as batches:
        return sum(batch.num_rows for batch in batches)


@contextmanager
def _open_parquet(path: Path) -> Generator[Any]:
    pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_names(file.schema_arrow.names)
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged("parquet", error) from error


@contextmanager
def _open_arrow(path: Path) -> Generator[Iterator[Any]]:
    """Gives the batches of a file, none where it is empty."""
    pyarrow: Any = importlib.import_module("pyarrow")
    ipc: Any = importlib.import_module("pyarrow.ipc")
    with path.open("rb") as file:
        start = file.read(len(_FILE_MAGIC))
    if not start:
        yield iter(())
        return
    try:
        with pyarrow.memory_map(str(path)) as source:
            if start == _FILE_MAGIC:
                reader: Any = ipc.open_file(source)
                batches: Iterator[Any] = map(reader.get_batch, range(reader.num_record_batches))
            else:
                reader = ipc.open_stream(source)
                batches = iter(reader)
            _check_names(reader.schema.names)
            yield batches
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged("an Arrow file", error) from error


def _small(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _read_batches(batches: Iterator[Any]) -> Iterator[FileRow]:
    pyarrow: Any = importlib.import_module("pyarrow")
    number = 0
    unfit = (pyarrow.ArrowException, ValueError, OverflowError)
    for batch in batches:
        try:
            rows = _to_rows(batch)
        except unfit:  # one of its rows: find out which
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield FileRow(number, _to_rows(batch.slice(index, 1))[0])
                except unfit as error:
                    yield FileRow(number, NO_COLUMNS, mistake=_explain(error))
            continue
        for row in rows:
            number += 1
            yield FileRow(number, row)


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    """Returns the rows of a batch, after the whole of it was found sound: pyarrow trusts files."""
    batch.validate(full=True)
    return batch.to_pylist()


def _check_names(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FileError(f"has the column `{twice}` twice", "write the file again without it")


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return "a text that is not UTF-8"
    return f"a value that Python cannot hold: {_short(error)}"


def _damaged(what: str, error: Exception) -> FileError:
    return FileError(f"is not {what}, or is damaged: {_short(error)}", "write the file again")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
