"""Rows a chunk at a time: read in one process, tokenized in another.

Chunks are bounded in rows and in characters, so that one of them fits in memory whatever the rows
are. Where a chunk ends depends on the rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from fsdpq.data.preparing.prepared import Documents, join_documents
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import TEMPLATE_HINT, Row, RowTokenizer, cut_row
from fsdpq.errors import Location, Problem
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.read import NumberedRow, read_rows
from fsdpq.rows.source import RowSource

Item = TypeVar("Item")

CHUNK_ROWS = 500
CHUNK_CHARACTERS = 2_000_000
"""A chunk ends with the row that reaches one of these."""


@dataclass(frozen=True)
class RowChunk:
    """Some rows of one source, in order.

    Attributes:
        source: its number.
        rows: good rows.
    """

    source: int
    rows: Sequence[NumberedRow]

    @property
    def contents(self) -> list[Mapping[str, Any]]:
        """The rows' columns, without their places."""
        return [row.content for row in self.rows]


class Mistake(NamedTuple):
    """Why a row of a chunk cannot be used.

    Attributes:
        place: of the row in its chunk, from 0.
        message: what is wrong.
        hint: what to do.
    """

    place: int
    message: str
    hint: str

    def at(self, row: NumberedRow) -> Problem:
        """Returns it with the place of its row."""
        message = self.message if row.line else f"row {row.number}: {self.message}"
        location = Location(str(row.file), row.line, min(row.line, 1))
        return Problem(message, "data", location, self.hint)


@dataclass
class TokenizedChunk:
    """A chunk's documents, and what became of its other rows.

    Attributes:
        documents: rows that can be trained on; their origins are not known yet.
        kept: place in the chunk of each of them.
        num_cut: rows that were longer than ``data.seq_len`` and were cut.
        num_too_long: those that were left out.
        num_untrained: rows without a token that carries loss.
        unrendered: rows that no template renders.
        over_length: rows that are too long with ``data.truncation: error``.
    """

    documents: Documents = field(default_factory=lambda: join_documents([], []))
    kept: list[int] = field(default_factory=list[int])
    num_cut: int = 0
    num_too_long: int = 0
    num_untrained: int = 0
    unrendered: list[Mistake] = field(default_factory=list[Mistake])
    over_length: list[Mistake] = field(default_factory=list[Mistake])

    def located(self, chunk: RowChunk) -> Documents:
        """Returns the documents with their origins."""
        origins = [(chunk.source, chunk.rows[place].number) for place in self.kept]
        return replace(self.documents, origins=np.array(origins, np.int64).reshape(-1, 2))


def read_chunks(
    source: RowSource, number: int, *, on_bad_row: Literal["error", "skip"]
) -> Iterator[RowChunk]:
    """Yields the rows of a source; ``number`` is the source's.

    Raises:
        RecipeError: rows are not of their format, or a file cannot be read.
    """
    rows = read_rows(source, on_bad_row=on_bad_row)
    for chunk, _ in bounded_chunks(rows, lambda row: row.content):
        if chunk:
            yield RowChunk(number, chunk)


def bounded_chunks(
    rows: Iterable[Item], content_of: Callable[[Item], Mapping[str, Any]]
) -> Iterator[tuple[list[Item], bool]]:
    """Yields all rows in chunks that are bounded, and whether each is the last.

    The last one is empty where there are no rows, and only there.
    """
    chunk: list[Item] = []
    num_characters = 0
    for row in rows:
        if len(chunk) == CHUNK_ROWS or num_characters >= CHUNK_CHARACTERS:
            yield chunk, False
            chunk, num_characters = [], 0
        chunk.append(row)
        num_characters += count_characters(content_of(row))
    yield chunk, True


class ChunkTokenizer:
    """Tokenizes chunks and applies ``data.truncation``.

    Args:
        tokenizers: for the rows of each source, by its number.
        options: the recipe's ``data``.
    """

    def __init__(self, tokenizers: Sequence[RowTokenizer], options: DataOptions) -> None:
        self._tokenizers, self._options = tokenizers, options

    def __call__(self, chunk: tuple[int, Sequence[Mapping[str, Any]]]) -> TokenizedChunk:
        """Returns what becomes of the rows of a source."""
        source, contents = chunk
        found, rows = TokenizedChunk(), list[Row]()
        for place, row in enumerate(self._tokenizers[source].tokenize(contents)):
            if isinstance(row, TemplateError):
                found.unrendered.append(Mistake(place, str(row), TEMPLATE_HINT))
            elif (fitting := self._fit(place, row, found)) is None:
                continue
            elif fitting.num_trained:
                rows.append(fitting)
                found.kept.append(place)
            else:
                found.num_untrained += 1
        found.documents = join_documents(rows, np.zeros((len(rows), 2), np.int64))
        return found

    def _fit(self, place: int, row: Row, found: TokenizedChunk) -> Row | None:
        """Returns a row of ``data.seq_len`` tokens at most, None where it is not to be used."""
        length, options = len(row), self._options
        if length <= options.seq_len:
            return row
        if options.truncation == "error":
            message = f"{length} tokens, and `data.seq_len` is {options.seq_len}"
            hint = "raise data.seq_len, or choose another data.truncation"
            found.over_length.append(Mistake(place, message, hint))
            return None
        if options.truncation == "drop":
            found.num_too_long += 1
            return None
        found.num_cut += 1
        return cut_row(row, options.seq_len, from_start=options.truncation == "truncate_start")


def count_characters(value: Any) -> int:
    """Returns the characters of all texts in a row's columns."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(count_characters, value.values()))
    return sum(map(count_characters, value)) if isinstance(value, list | tuple) else 0
