"""Files of rows: which there are, and reading each sort of them. Torch-free.

A bad row is yielded with what is wrong with it instead of raised, so that all of them are reported
at once. Memory holds a line, an item of a JSON list, a batch of an Arrow file, or a row group of a
parquet file; a row of more than 64 MiB is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdpq.recipe.sections.data import DataOptions


def iterate_rows(path: Path, options: DataOptions) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file in the format of ``options``; see `fsdpq.rows.read.read_rows`."""
    from fsdpq.rows.read import read_rows
    from fsdpq.rows.source import RowSource, SourceFile

    files = (SourceFile(path, ""),)
    source = RowSource(str(path), files, options.format, 0, max_rows=options.max_rows)
    return (row.content for row in read_rows(source))
