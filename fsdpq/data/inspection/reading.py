"""Reads the rows of an inspection in batches, with their places, the bad ones too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdpq.data.inspection.content import texts_of
from fsdpq.data.inspection.findings import Place
from fsdpq.data.preparing.mixture import choose_rows, count_rows
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.read import check_rows
from fsdpq.rows.source import RowSource

BATCH_ROWS = 500
BATCH_CHARACTERS = 2_000_000
"""A batch ends with the row that reaches one of these."""

_EXCERPT = 160
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlacedRow:
    """A row and where it was read; ``content`` is empty where it has a ``mistake``."""

    place: Place
    content: Mapping[str, Any]
    mistake: str = ""
    excerpt: str = ""


def read_batches(sources: Sequence[RowSource], options: DataOptions) -> Iterator[list[PlacedRow]]:
    """Yields the rows of all sources, each batch of one source; where streamed, one window each."""
    for index, source in enumerate(sources):
        rows = read_placed(index, source)
        if options.streaming:
            rows = itertools.islice(rows, options.stream_window)
        batch, characters = list[PlacedRow](), 0
        for row in rows:
            batch.append(row)
            characters += sum(map(len, texts_of(row.content)))
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def read_placed(index: int, source: RowSource) -> Iterator[PlacedRow]:
    """Yields the rows of a source, good or not, up to its ``max_rows`` good ones."""
    left = source.max_rows
    for file, row, content, mistake in check_rows(source):
        if left == 0:
            return
        place = Place(index, str(file), row.number, row.line)
        if mistake:
            yield PlacedRow(place, {}, mistake, row.text[:_EXCERPT])
        else:
            left = None if left is None else left - 1
            yield PlacedRow(place, content)


def choose_epoch(
    recipe: Recipe, sources: Sequence[RowSource], kept_sources: Int64, held_out: Sequence[int]
) -> Int64:
    """Returns which usable rows an epoch trains on, as preparing the data chooses them.

    Args:
        recipe: the recipe.
        sources: those of training, with their weights.
        kept_sources: source of every usable row, ``(rows,)``.
        held_out: those of them that are held out.
    """
    is_train = np.ones(len(kept_sources), dtype=bool)
    is_train[np.asarray(held_out, dtype=np.int64)] = False
    parts = [np.flatnonzero(is_train & (kept_sources == n)) for n in range(len(sources))]
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(parts) or not all(map(len, parts)):
        return np.concatenate(parts)
    sizes = count_rows([len(part) for part in parts], weights, recipe.data.mixture_stopping)
    seed = recipe.training.seed
    return np.concatenate(
        [
            choose_rows(part, size, seed=seed, part=number)
            for number, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
    )
