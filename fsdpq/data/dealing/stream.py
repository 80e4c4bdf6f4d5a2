"""Reads, tokenizes, shuffles and packs rows while training, window by window.

A window is ``data.stream_window`` rows that follow each other in an epoch; the last one of an epoch
may have fewer. Its rows are cut, those without loss are left out, the others are packed among
themselves and shuffled by seed, epoch and window. A step takes rows of two windows where one ends,
so no row is lost. A place in this order is an epoch, a window and a row of it: going on from there
needs the rows of earlier windows to be read, and nothing of them to be tokenized.

Every rank runs the whole stream in a thread and computes its own rows: the ranks need not talk, and
the order does not depend on how many they are. Tokenizing costs each of them what it costs one.

Memory: two windows of tokens, 5 bytes each, and one chunk of text.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdpq.data.dealing.interleave import MixedRow, RowMixture
from fsdpq.data.dealing.loader import DealtRow
from fsdpq.data.dealing.order import Position, epoch_order
from fsdpq.data.dealing.prefetch import Prefetch
from fsdpq.data.pack import pack_lengths
from fsdpq.data.preparing.prepared import PreparedRows, RowIndex, join_documents
from fsdpq.data.preparing.row_chunks import (
    CHUNK_ROWS,
    ChunkTokenizer,
    bounded_chunks,
)
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.source import RowSource

MAX_PROBLEMS = 20
"""Rows of a chunk that are reported when they cannot be used."""

NOT_IN_DIGEST = frozenset(
    ("path", "dataset", "config", "revision", "mixture", "eval", "eval_fraction", "streaming")
)
"""Options that say where rows are: the sources' hashes say what they are."""


@dataclass
class StreamCounts:
    """What became of the rows of a window, or of all so far.

    Attributes:
        rows: rows that were read.
        bad_rows: those of them that no template renders (``data.on_bad_row: skip``).
        cut: rows longer than ``data.seq_len`` that were cut.
        too_long: rows longer than that which were left out.
        untrained: rows without a token that carries loss, left out.
        documents: rows that are trained on.
        sequences: what they were packed into; as many as ``documents`` where nothing is packed.
        tokens: of all of these.
        trained_tokens: those that carry loss.
    """

    rows: int = 0
    bad_rows: int = 0
    cut: int = 0
    too_long: int = 0
    untrained: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, other: StreamCounts) -> None:
        """Adds the counts of other rows."""
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class WindowReport(NamedTuple):
    """Tells what became of a window that is about to be dealt.

    Attributes:
        epoch: from 1.
        window: from 0.
        counts: of this window.
    """

    epoch: int
    window: int
    counts: StreamCounts


class RowStream:
    """Rows of files in their global order, without end; see `fsdpq.data.dealing.loader.RowOrder`.

    Args:
        sources: the parts of the mixture.
        options: the recipe's ``data``.
        tokenizer: of the base model; the stream uses a copy, in its own thread.
        seed: ``training.seed``.
        template_text: content of the template's file, where the recipe names one.
        on_window: told of every window, from the thread that deals it.

    Raises:
        RecipeError: the tokenizer cannot give what exact masks need.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        options: DataOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        template_text: str | None = None,
        on_window: Callable[[WindowReport], None] = lambda _report: None,
    ) -> None:
        self._options = options
        self._on_window = on_window
        self._mixture = RowMixture(
            sources, stopping=options.mixture_stopping, on_bad_row=options.on_bad_row
        )
        # One tokenizer in two threads fails with "Already borrowed" (tokenizers#537).
        own = copy.deepcopy(tokenizer)
        template = choose_template(own, options.chat_template, template_text)
        row_tokenizers = [
            RowTokenizer(own, options, source.format, template=template) for source in sources
        ]
        self._tokenize = ChunkTokenizer(row_tokenizers, options)
        self._ahead: Prefetch[_Chunk] | None = None
        self.counts = StreamCounts()
        self.seed = seed
        self.digest = _digest(sources, options, own, "" if template is None else template.source)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of files that one epoch reads."""
        return self._mixture.rows_per_epoch

    def deal(self, start: Position) -> Iterator[DealtRow]:
        """Yields the rows after ``start``, epoch after epoch.

        Raises:
            RecipeError: rows cannot be used, with their places, or none of an epoch carries loss.
            TrainingError: a file has other rows than when the launcher read it.
        """
        chunks_per_window = -(-self._options.stream_window // CHUNK_ROWS)
        chunks = self.read_chunks(start)
        self._ahead = Prefetch(chunks, depth=chunks_per_window + 1, name="fsdpq-rows")
        # A resumed epoch has dealt rows, or enough windows to judge it at its next turn.
        first, dealt_in_epoch = start.row, start.window + start.row
        with self._ahead as ahead:
            for window in _join_windows(ahead, self._options):
                self.counts.add(window.counts)
                self._on_window(WindowReport(window.epoch, window.number, window.counts))
                dealt_in_epoch += len(window.rows)
                yield from self._deal_window(window, first)
                if window.is_last:
                    if dealt_in_epoch == 0:
                        raise _nothing_to_train(self.rows_per_epoch)
                    dealt_in_epoch = 0
                first = 0
                del window  # or it would be alive until the next one is

    def close(self) -> None:
        """Ends the reading in the background, and wakes who waits for it."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _deal_window(self, window: _Window, first: int) -> Iterator[DealtRow]:
        rows = window.rows
        lengths, num_trained = rows.lengths.tolist(), rows.num_trained.tolist()
        order: Sequence[int] = range(len(rows))
        if self._options.shuffle:
            drawn = epoch_order(len(rows), seed=self.seed, epoch=window.epoch, window=window.number)
            order = drawn.tolist()
        behind = Position(window.epoch, window.number + 1)
        if window.is_last:
            behind = Position(window.epoch + 1)
        for done, place in enumerate(order[first:], start=first + 1):
            is_last = done == len(rows)
            after = behind if is_last else Position(window.epoch, window.number, done)
            read = functools.partial(rows.__getitem__, place)
            yield DealtRow(lengths[place], num_trained[place], read, after)

    def read_chunks(self, start: Position) -> Iterator[_Chunk]:
        """Yields tokenized rows from the window of ``start`` on, window by window without end."""
        size = self._options.stream_window
        skip = start.window * size
        mixed = self._mixture.read(epoch=start.epoch, skip=skip)
        epoch, number, left = start.epoch, start.window, self.rows_per_epoch - skip
        while True:
            window = itertools.islice(mixed, min(size, left))
            left -= min(size, left)
            for rows, ends_window in bounded_chunks(window, lambda mixed: mixed.row.content):
                yield self._tokenize_chunk(rows, _Place(epoch, number, ends_window, left == 0))
            number += 1
            if left == 0:
                epoch, number, left = epoch + 1, 0, self.rows_per_epoch

    def _tokenize_chunk(self, rows: Sequence[MixedRow], place: _Place) -> _Chunk:
        counts, found = StreamCounts(rows=len(rows)), list[tuple[int, Row]]()
        problems: list[Problem] = []
        for part in sorted({row.part for row in rows}):
            places = [index for index, row in enumerate(rows) if row.part == part]
            result = self._tokenize((part, [rows[index].row.content for index in places]))
            skips = self._options.on_bad_row == "skip"
            counts.bad_rows += len(result.unrendered) if skips else 0
            counts.cut += result.num_cut
            counts.too_long += result.num_too_long
            counts.untrained += result.num_untrained
            mistakes = [*([] if skips else result.unrendered), *result.over_length]
            problems += [mistake.at(rows[places[mistake.place]].row) for mistake in mistakes]
            index = RowIndex.of_documents(np.arange(len(result.documents)))
            documents = PreparedRows(result.documents, index, packed=False)
            found += zip((places[kept] for kept in result.kept), documents, strict=True)
        if problems:
            raise RecipeError(problems[:MAX_PROBLEMS])
        found.sort(key=lambda item: item[0])
        return _Chunk(place, [row for _, row in found], counts)


def read_whole(
    source: RowSource,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_text: str | None = None,
) -> tuple[PreparedRows, StreamCounts]:
    """Returns all rows of a source, in memory, packed where the recipe says so, and their counts.

    Raises:
        RecipeError: rows cannot be used, with their places.
    """
    whole = options.model_copy(update={"stream_window": source.num_rows})
    stream = RowStream([source], whole, tokenizer, seed=0, template_text=template_text)
    chunks = stream.read_chunks(Position())
    window = next(_join_windows(chunks, whole))
    return window.rows, window.counts


class _Place(NamedTuple):
    """Where a chunk is.

    Attributes:
        epoch: from 1.
        window: from 0.
        ends_window: it is the last of its window.
        in_last_window: its window is the last of its epoch.
    """

    epoch: int
    window: int
    ends_window: bool
    in_last_window: bool


@dataclass(frozen=True)
class _Chunk:
    """Some tokenized rows of a window."""

    place: _Place
    rows: list[Row]
    counts: StreamCounts


@dataclass(frozen=True)
class _Window:
    """All rows of a window, packed where the recipe says so."""

    epoch: int
    number: int
    is_last: bool
    rows: PreparedRows
    counts: StreamCounts = field(default_factory=StreamCounts)


def _join_windows(chunks: Iterator[_Chunk], options: DataOptions) -> Iterator[_Window]:
    rows: list[Row] = []
    counts = StreamCounts()
    for chunk in chunks:
        rows += chunk.rows
        counts.add(chunk.counts)
        if chunk.place.ends_window:
            joined = [_build_window(chunk.place, rows, counts, options)]
            rows, counts = [], StreamCounts()
            yield joined.pop()


def _build_window(
    place: _Place, rows: Sequence[Row], counts: StreamCounts, options: DataOptions
) -> _Window:
    documents = join_documents(rows, np.zeros((len(rows), 2), np.int64))
    if options.packing == "none":
        index = RowIndex.of_documents(np.arange(len(rows)))
    else:
        index = RowIndex.of_sequences(pack_lengths(documents.lengths, options.seq_len))
    packed = PreparedRows(documents, index, packed=options.packing != "none")
    counts.documents, counts.sequences = len(documents), len(packed)
    counts.tokens, counts.trained_tokens = len(documents.tokens), int(documents.trained.sum())
    return _Window(place.epoch, place.window, place.in_last_window, packed, counts)


def _digest(
    sources: Sequence[RowSource],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> str:
    """Returns a hash of all that the rows and their order follow from, but for the seed."""
    rows = [
        {
            **{key: value for key, value in vars(source).items() if key not in ("name", "key")},
            "files": [file.sha256 for file in source.files],
            "columns": dict(source.columns),
        }
        for source in sources
    ]
    backend: Any = tokenizer.backend_tokenizer
    content = {
        "sources": rows,
        "options": options.model_dump(mode="json", exclude=set(NOT_IN_DIGEST)),
        "tokenizer": backend.to_str(),
        "template": template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _nothing_to_train(num_rows: int) -> RecipeError:
    message = f"none of the {num_rows} rows has a token that carries loss"
    hint = "look for missing answers, or raise data.seq_len"
    return RecipeError([Problem(message, "data", None, hint)])
