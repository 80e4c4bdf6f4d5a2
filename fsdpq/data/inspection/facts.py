"""The facts of single rows: few numbers each, so that they can cross processes and be kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdpq.data.inspection.content import (
    conversation,
    find_empty,
    find_role_mistakes,
    fingerprint,
    texts_of,
)
from fsdpq.data.inspection.samples import special_tokens
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import Row, RowTokenizer, cut_row
from fsdpq.recipe.sections.data import DataOptions


@dataclass(frozen=True)
class RowFacts:
    """What is counted of one good row.

    Attributes:
        tokens: before it is cut; 0 where it cannot be rendered.
        trained: tokens that carry loss, before it is cut.
        trained_kept: those left once it is cut to ``data.seq_len``.
        unknown: tokens that stand for text outside of the vocabulary.
        fingerprint: equal for rows that say the same.
        turns: answers in it.
        system: fingerprint of its system prompt, None without one.
        empty: parts without text.
        roles: what is unusual in the order of roles.
        has_marks: special tokens are written out in its text.
        mistake: why it cannot be rendered, empty where it can.
    """

    tokens: int
    trained: int
    trained_kept: int
    unknown: int
    fingerprint: int
    turns: int = 1
    system: int | None = None
    empty: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    has_marks: bool = False
    mistake: str = ""


class RowExaminer:
    """Finds the facts of rows; a process can inherit it.

    Args:
        tokenizer: of the base model.
        row_tokenizers: for the rows of each source, by its number.
        formats: those of the sources.
        options: the recipe's ``data``.
    """

    def __init__(
        self,
        tokenizer: Any,
        row_tokenizers: Sequence[RowTokenizer],
        formats: Sequence[str],
        options: DataOptions,
    ) -> None:
        self._row_tokenizers, self._formats, self._options = row_tokenizers, formats, options
        marks = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
        # Marks of one or two characters are words too.
        pattern = "|".join(re.escape(mark) for mark in marks if len(mark) > 2)
        self._marks = re.compile(pattern) if pattern else None
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        unknown = tokenizer.unk_token_id
        self._unknown_id = None if unknown in others else unknown

    def __call__(self, batch: tuple[int, Sequence[Mapping[str, Any]]]) -> list[RowFacts]:
        """Returns the facts of rows of a source, in order."""
        source, rows = batch
        tokenized = self._row_tokenizers[source].tokenize(rows)
        return [
            self._facts(row, done, self._formats[source])
            for row, done in zip(rows, tokenized, strict=True)
        ]

    def _facts(
        self, row: Mapping[str, Any], done: Row | TemplateError, format_name: str
    ) -> RowFacts:
        messages = conversation(row, format_name)
        found: dict[str, Any] = {
            "fingerprint": fingerprint(row),
            "turns": sum(m["role"] == "assistant" for m in messages) if messages else 1,
            "system": next((fingerprint(m) for m in messages if m["role"] == "system"), None),
            "empty": tuple(find_empty(row, format_name, messages)),
            "roles": tuple(find_role_mistakes(messages)),
            # Segments are written with their marks on purpose.
            "has_marks": format_name != "input_output" and self._has_marks(row),
        }
        if isinstance(done, TemplateError):
            return RowFacts(0, 0, 0, 0, mistake=str(done), **found)
        unknown = self._unknown_id
        return RowFacts(
            tokens=len(done.input_ids),
            trained=done.num_trained,
            trained_kept=kept_row(done, self._options).num_trained,
            unknown=0 if unknown is None else int(np.count_nonzero(done.input_ids == unknown)),
            **found,
        )

    def _has_marks(self, row: Mapping[str, Any]) -> bool:
        marks = self._marks
        return marks is not None and any(marks.search(text) for text in texts_of(row))


def kept_row(row: Row, options: DataOptions) -> Row:
    """Returns what ``data.truncation`` leaves of a row: no token where it leaves the row out."""
    if len(row.input_ids) <= options.seq_len:
        return row
    if options.truncation in ("drop", "error"):
        return Row(row.input_ids[:0], row.loss_mask[:0])
    return cut_row(row, options.seq_len, from_start=options.truncation == "truncate_start")
