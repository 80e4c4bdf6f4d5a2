"""Rows of several files' sources one after another, in proportion, without end.

The order in which rows are read for a stream: it depends on the sources only, so every rank and
every later run finds the same row at the same place.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from fsdpq.data.preparing.mixture import count_rows
from fsdpq.errors import TrainingError
from fsdpq.rows.read import NumberedRow, read_rows
from fsdpq.rows.source import RowSource


class MixedRow(NamedTuple):
    """One row of a mixture.

    Attributes:
        part: number of its source.
        row: as it was read.
    """

    part: int
    row: NumberedRow


class RowMixture:
    """The rows of some sources, those of each spread evenly over an epoch.

    Without weights an epoch has every row once. With weights it takes of each source as many rows
    as `fsdpq.data.preparing.mixture.count_rows` says; the next epoch goes on where it stopped, so
    in time every row is used.

    Args:
        sources: read once and found good, with the number of their rows.
        stopping: ``data.mixture_stopping``.
        on_bad_row: ``data.on_bad_row``.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        *,
        stopping: Literal["first_exhausted", "all_exhausted"],
        on_bad_row: Literal["error", "skip"],
    ) -> None:
        self._sources = sources
        self._on_bad_row: Literal["error", "skip"] = on_bad_row
        counts = [source.num_rows for source in sources]
        weights = [source.weight for source in sources if source.weight is not None]
        self._per_epoch = count_rows(counts, weights, stopping) if weights else counts
        self._stamps = [_stamp(source) for source in sources]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, of all sources."""
        return sum(self._per_epoch)

    def read(self, *, epoch: int, skip: int) -> Iterator[MixedRow]:
        """Yields rows from one place on, epoch after epoch without end.

        Args:
            epoch: where to begin, from 1.
            skip: rows of that epoch that come before; they are read, which is the way to find the
                next one, and nothing else is done with them.

        Raises:
            TrainingError: a file has other rows than when the launcher read it.
        """
        skipped = Counter(itertools.islice(self._turns(), skip))
        readers = [
            self._read_endlessly(part, (epoch - 1) * count + skipped[part])
            for part, count in enumerate(self._per_epoch)
        ]
        turns = itertools.islice(self._turns(), skip, None)
        while True:
            for part in turns:
                yield MixedRow(part, next(readers[part]))
            turns = self._turns()

    def _turns(self) -> Iterator[int]:
        """Yields which source each row of an epoch comes from."""
        if len(self._per_epoch) == 1:
            return itertools.repeat(0, self._per_epoch[0])
        times = [_spread(part, count) for part, count in enumerate(self._per_epoch)]
        return (part for _, part in heapq.merge(*times))

    def _read_endlessly(self, part: int, skip: int) -> Iterator[NumberedRow]:
        source = self._sources[part]
        skip %= source.num_rows
        while True:
            num_read = 0
            for row in read_rows(source, on_bad_row=self._on_bad_row):
                num_read += 1
                if num_read > skip:
                    yield row
            if num_read != source.num_rows or _stamp(source) != self._stamps[part]:
                raise TrainingError(
                    f"{source.name} was changed while it was streamed",
                    hint="leave its files alone during a run; start the run again",
                )
            skip = 0


def _stamp(source: RowSource) -> list[tuple[int, int]]:
    """Returns what changes when somebody writes to a source's files."""
    found = [file.path.stat() for file in source.files]
    return [(status.st_size, status.st_mtime_ns) for status in found]


def _spread(part: int, count: int) -> Iterator[tuple[float, int]]:
    """Yields when the rows of a source come, between 0 and 1; fp64 divides alike everywhere."""
    return (((2 * index + 1) / (2 * count), part) for index in range(count))
