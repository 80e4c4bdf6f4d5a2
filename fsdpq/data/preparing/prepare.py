"""Prepares the data of a run: rows of files become documents of tokens, and rows of training.

The order: read, tokenize, cut to ``data.seq_len``, leave out what carries no loss, hold out rows
for evaluation, mix the parts, pack. Holding out comes before mixing, so that no row that a mixture
repeats is on both sides. Tokens go to disk chunk by chunk and are not touched again: what follows
works on lengths. The result depends on the rows, the tokenizer, the options and the seed only, not
on the number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdpq.data.dealing.loader import split_rows
from fsdpq.data.pack import pack_lengths
from fsdpq.data.preparing.mixture import choose_rows, count_rows
from fsdpq.data.preparing.prepared import PreparedWriter, RowIndex
from fsdpq.data.preparing.processes import map_in_order
from fsdpq.data.preparing.row_chunks import (
    ChunkTokenizer,
    RowChunk,
    TokenizedChunk,
    read_chunks,
)
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.report import DataReport, SourceCounts
from fsdpq.rows.source import DataSources

MAX_PROBLEMS = 20
"""Rows that are reported when they cannot be used; tokenizing stops there."""

QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and how.

    Attributes:
        sources: the rows.
        options: the recipe's ``data``.
        tokenizer: of the base model.
        seed: ``training.seed``: which rows are held out, and which a mixture takes.
        num_processes: that tokenize.
        on_progress: told how many rows of how many are tokenized.
    """

    sources: DataSources
    options: DataOptions
    tokenizer: PreTrainedTokenizerBase
    seed: int
    num_processes: int = 1
    on_progress: Callable[[int, int], None] = lambda _done, _total: None

    def row_tokenizers(self) -> list[RowTokenizer]:
        """Returns what tokenizes the rows of each source."""
        template = choose_template(
            self.tokenizer, self.options.chat_template, self.sources.chat_template
        )
        return [
            RowTokenizer(self.tokenizer, self.options, source.format, template=template)
            for source in self.sources.every
        ]


def prepare_data(job: Preparation, directory: Path, *, key: Mapping[str, Any]) -> DataReport:
    """Writes prepared data into an empty directory and returns what became of the rows.

    Args:
        job: what is prepared.
        directory: exists; see `fsdpq.rows.prepared_files`.
        key: what the data is made from, kept in the manifest.

    Raises:
        RecipeError: rows that no template renders or, with ``data.truncation: error``, that are too
            long, with their places; no token carries loss; a part of a mixture has no rows left.
        LaunchError: a process that tokenizes died.
    """
    writer = PreparedWriter(directory)
    try:
        counts = _tokenize_all(job, writer)
        parts, own_eval = _documents_of_sources(job, counts)
        train, held_out = _split(job, parts, own_eval)
        epoch, lengths = _mix(job, train), writer.lengths()
        train_rows, held_out_rows = (
            _index(documents, lengths, job.options) for documents in (epoch, held_out)
        )
        whole = _report_rows(job, (train_rows, held_out_rows), lengths, writer.trained())
        sources = _report_sources(job, counts, (epoch, held_out), lengths, writer.trained())
        num_parts = len(job.sources.train)
        report = replace(
            whole,
            sources=tuple(sources[:num_parts]),
            eval=sources[num_parts] if job.sources.eval is not None else None,
        )
        _check_unchanged(job)
        writer.finish(
            train=train_rows,
            held_out=held_out_rows,
            packed=job.options.packing != "none",
            report=report,
            key=key,
        )
    finally:
        writer.close()
    return report


@dataclass
class _Counts:
    """What became of the rows of one source so far."""

    num_rows: int = 0
    num_bad: int = 0
    num_cut: int = 0
    num_too_long: int = 0
    num_untrained: int = 0
    num_kept: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])

    def take(self, chunk: RowChunk, result: TokenizedChunk, *, skips: bool) -> None:
        """Takes the counts of a chunk; its mistakes become bad rows or Problems."""
        self.num_rows += len(chunk.rows) - (len(result.unrendered) if skips else 0)
        self.num_bad += len(result.unrendered) if skips else 0
        self.num_cut += result.num_cut
        self.num_too_long += result.num_too_long
        self.num_untrained += result.num_untrained
        self.num_kept += len(result.documents)
        mistakes = [*([] if skips else result.unrendered), *result.over_length]
        self.problems += [mistake.at(chunk.rows[mistake.place]) for mistake in sorted(mistakes)]


def _tokenize_all(job: Preparation, writer: PreparedWriter) -> list[_Counts]:
    """Writes the documents of all sources, in order, and returns what became of the rows."""
    counts = [_Counts(num_bad=source.num_bad_rows) for source in job.sources.every]
    total = sum(source.num_rows for source in job.sources.every)
    skips = job.options.on_bad_row == "skip"
    function = ChunkTokenizer(job.row_tokenizers(), job.options)
    taken: deque[RowChunk] = deque()

    def payloads() -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
        for chunk in _all_chunks(job):
            taken.append(chunk)
            yield chunk.source, chunk.contents

    done = 0
    for result in map_in_order(function, payloads(), num_processes=job.num_processes):
        chunk = taken.popleft()
        counts[chunk.source].take(chunk, result, skips=skips)
        problems = [problem for count in counts for problem in count.problems]
        if len(problems) >= MAX_PROBLEMS:
            raise RecipeError(problems[:MAX_PROBLEMS])
        writer.add(result.located(chunk))
        done += len(chunk.rows)
        job.on_progress(done, total)
    problems = [problem for count in counts for problem in count.problems]
    if problems:
        raise RecipeError(problems)
    return counts


def _all_chunks(job: Preparation) -> Iterator[RowChunk]:
    return itertools.chain.from_iterable(
        read_chunks(source, number, on_bad_row=job.options.on_bad_row)
        for number, source in enumerate(job.sources.every)
    )


def _documents_of_sources(
    job: Preparation, counts: Sequence[_Counts]
) -> tuple[list[Int64], Int64 | None]:
    """Returns the numbers of the documents of each part, and of the evaluation source.

    Raises:
        RecipeError: none of them can be trained on.
    """
    stops = np.cumsum([count.num_kept for count in counts]).tolist()
    ranges = [
        np.arange(stop - count.num_kept, stop, dtype=np.int64)
        for stop, count in zip(stops, counts, strict=True)
    ]
    num_parts = len(job.sources.train)
    if not sum(len(part) for part in ranges[:num_parts]):
        num_rows = sum(count.num_rows for count in counts[:num_parts])
        raise _unusable(
            f"none of the {num_rows} rows has a token that carries loss",
            "look for missing answers, or raise data.seq_len",
        )
    own_eval = ranges[num_parts] if job.sources.eval is not None else None
    if own_eval is not None and not len(own_eval):
        message = f"none of the {counts[-1].num_rows} rows for evaluation has a token that "
        hint = "look for missing answers, or raise data.seq_len"
        raise RecipeError([Problem(message + "carries loss", "data.eval", None, hint)])
    return ranges[:num_parts], own_eval


def _split(
    job: Preparation, parts: Sequence[Int64], own_eval: Int64 | None
) -> tuple[list[Int64], Int64]:
    """Returns the documents of each part to train on, and those that are held out.

    Raises:
        RecipeError: there is one row only, and rows are to be held out.
    """
    if own_eval is not None:
        return list(parts), own_eval
    documents, fraction = np.concatenate(parts), job.options.eval_fraction
    if fraction and len(documents) < 2:
        hint = "add rows, or set data.eval_fraction=0"
        raise _unusable("one row cannot be split for evaluation", hint)
    _, chosen = split_rows(len(documents), fraction, job.seed)
    held_out = documents[np.asarray(chosen, dtype=np.int64)]
    return [part[~np.isin(part, held_out)] for part in parts], held_out


def _mix(job: Preparation, parts: Sequence[Int64]) -> Int64:
    """Returns the documents of one epoch, part after part.

    Raises:
        RecipeError: a part with a weight has no rows.
    """
    weights = [source.weight for source in job.sources.train]
    if any(weight is None for weight in weights):
        return np.concatenate(parts)
    for source, part in zip(job.sources.train, parts, strict=True):
        if not len(part):
            message = f"the part `{source.name}` of the mixture has no rows left to train on"
            raise _unusable(message, "take it out of `data.mixture`, or give it more rows")
    shares = [weight for weight in weights if weight is not None]
    counts = count_rows([len(part) for part in parts], shares, job.options.mixture_stopping)
    return np.concatenate(
        [
            choose_rows(part, count, seed=job.seed, part=number)
            for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
    )


def _index(documents: Int64, lengths: Int64, options: DataOptions) -> RowIndex:
    """Returns rows of training: sequences of documents where they are packed, else documents."""
    if options.packing == "none":
        return RowIndex.of_documents(documents)
    sequences = pack_lengths(lengths[documents], options.seq_len)
    return RowIndex.of_sequences([documents[sequence] for sequence in sequences])


def _report_sources(
    job: Preparation,
    counts: Sequence[_Counts],
    splits: tuple[Int64, Int64],
    lengths: Int64,
    trained: Int64,
) -> list[SourceCounts]:
    """Returns what became of the rows of every source, that of evaluation last."""
    stops = np.cumsum([count.num_kept for count in counts]).tolist()
    sources: list[SourceCounts] = []
    for source, count, stop in zip(job.sources.every, counts, stops, strict=True):
        own = slice(stop - count.num_kept, stop)
        sources.append(
            SourceCounts(
                name=source.name,
                num_rows=count.num_rows,
                num_bad=count.num_bad,
                num_cut=count.num_cut,
                num_too_long=count.num_too_long,
                num_untrained=count.num_untrained,
                num_tokens=int(lengths[own].sum()),
                num_trained=int(trained[own].sum()),
                num_used=_count_between(splits[0], own),
                num_held_out=_count_between(splits[1], own),
            )
        )
    return sources


def _report_rows(
    job: Preparation, rows: tuple[RowIndex, RowIndex], lengths: Int64, trained: Int64
) -> DataReport:
    """Returns what is trained on and evaluated, without its sources."""
    train, held_out = rows
    num_tokens, is_packed = int(lengths[train.documents].sum()), job.options.packing != "none"
    capacity = train.num_rows * job.options.seq_len
    quantiles = np.quantile(lengths, np.array(QUANTILES) / 100, method="inverted_cdf").tolist()
    return DataReport(
        seq_len=job.options.seq_len,
        sources=(),
        num_train_rows=len(train.documents),
        num_sequences=train.num_rows,
        num_held_out=len(held_out.documents),
        num_held_out_sequences=held_out.num_rows,
        num_tokens=num_tokens,
        num_trained=int(trained[train.documents].sum()),
        fill=num_tokens / capacity if is_packed else None,
        lengths={str(q): int(n) for q, n in zip(QUANTILES, quantiles, strict=True)},
    )


def _count_between(documents: Int64, own: slice) -> int:
    return int(np.count_nonzero((documents >= own.start) & (documents < own.stop)))


def _check_unchanged(job: Preparation) -> None:
    """Raises `RecipeError` where a file is not what the launcher found: the key would be wrong."""
    for source in job.sources.every:
        for file in source.files:
            with file.path.open("rb") as opened:
                digest = hashlib.sha256()
                while part := opened.read(1 << 20):
                    digest.update(part)
            if digest.hexdigest() != file.sha256:
                message = f"`{file.path}` changed while its rows were read"
                location = Location(str(file.path))
                raise RecipeError([Problem(message, "data", location, "start again")])


def _unusable(message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(message, "data", None, hint)])
