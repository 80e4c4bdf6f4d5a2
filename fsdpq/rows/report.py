"""What became of a run's rows: counts per source, lengths, how well sequences are filled.

Written when data is prepared, kept with it, and shown by the launcher, the run's report and
``fsdpq data inspect``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SourceCounts:
    """What became of the rows of one source.

    Attributes:
        name: where they came from, for people.
        num_rows: good rows that were read.
        num_bad: rows left out because they are not of their format, or no template renders them
            (``data.on_bad_row: skip``).
        num_cut: rows longer than ``data.seq_len`` that were cut.
        num_too_long: rows longer than that which were left out (``data.truncation: drop``).
        num_untrained: rows without a token that carries loss, left out.
        num_tokens: tokens of the rows that were kept, cut to ``data.seq_len``.
        num_trained: those of them that carry loss.
        num_held_out: rows held out for evaluation.
        num_used: rows of one epoch of training; with weights some are left out or repeated.
    """

    name: str
    num_rows: int = 0
    num_bad: int = 0
    num_cut: int = 0
    num_too_long: int = 0
    num_untrained: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_held_out: int = 0
    num_used: int = 0

    def sentences(self, seq_len: int, *, of: str = "") -> list[str]:
        """Returns what was done to rows, one sentence each; ``of`` says of which (`` of X``)."""
        longer = f"longer than {seq_len} tokens"
        done = [
            (self.num_cut, f"are {longer}: cut"),
            (self.num_too_long, f"are {longer}: left out"),
            (self.num_untrained, "have no token that carries loss: left out"),
            (self.num_bad, "are bad: left out"),
        ]
        return [f"{count} rows{of} {what}" for count, what in done if count]

    @property
    def num_kept(self) -> int:
        """Rows that can be trained on."""
        return self.num_rows - self.num_too_long - self.num_untrained


@dataclass(frozen=True)
class DataReport:
    """What became of all rows.

    Attributes:
        seq_len: ``data.seq_len``.
        sources: one a source, in the recipe's order.
        eval: of the source of the evaluation rows, None where there is none.
        num_train_rows: documents of one epoch, before they are packed.
        num_sequences: rows that the loader deals: sequences where documents are packed, else
            documents.
        num_held_out: held-out documents.
        num_held_out_sequences: rows that are evaluated.
        num_tokens: tokens of one epoch.
        num_trained: those that carry loss.
        fill: share of ``seq_len`` that the sequences of an epoch fill, None where nothing is
            packed.
        lengths: share of the documents, as a percentage -> tokens of the longest of them:
            ``{"0": 12, "50": 130, "100": 512}``.
    """

    seq_len: int
    sources: tuple[SourceCounts, ...]
    eval: SourceCounts | None = None
    num_train_rows: int = 0
    num_sequences: int = 0
    num_held_out: int = 0
    num_held_out_sequences: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    fill: float | None = None
    lengths: Mapping[str, int] = field(default_factory=dict[str, int])

    def as_json(self) -> dict[str, Any]:
        """Returns the same as plain JSON data."""
        return {**asdict(self), "sources": [asdict(source) for source in self.sources]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataReport:
        """Returns what `as_json` wrote."""
        fields: dict[str, Any] = {
            **data,
            "sources": tuple(SourceCounts(**entry) for entry in data["sources"]),
            "eval": None if data["eval"] is None else SourceCounts(**data["eval"]),
        }
        return cls(**fields)
