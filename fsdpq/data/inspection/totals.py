"""Totals over all rows: counts of every source, findings, lengths, duplicates, packing."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdpq.data.inspection.facts import RowFacts
from fsdpq.data.inspection.findings import Findings, Place
from fsdpq.recipe.sections.data import DataOptions

COUNTS = (
    "rows", "bad_rows", "unrenderable", "cut", "too_long", "untrained", "usable", "empty",
    "duplicates", "role_mistakes", "special_tokens", "unknown_tokens", "tokens", "trained_tokens",
    "kept_tokens", "kept_trained_tokens", "system_prompts", "turns",
)  # fmt: skip
"""What is counted of every source."""


@dataclass(frozen=True)
class _Columns:
    """One entry a good row, 30 bytes together."""

    fingerprints: array[int]
    tokens: array[int]
    kept: array[int]
    source: array[int]
    file: array[int]
    row: array[int]
    line: array[int]


class Totals:
    """Adds up the facts of rows. Memory is 30 bytes a row, and the texts of a few findings.

    Args:
        options: the recipe's ``data``.
        num_train: how many of the sources are trained on; the next one is for evaluation.
    """

    def __init__(self, options: DataOptions, num_train: int = 1) -> None:
        self.options = options
        self.num_train = num_train
        self.findings = Findings()
        self.counts: dict[int, Counter[str]] = {}
        self.max_turns = 0
        self._systems: set[int] = set()
        self._files: dict[str, int] = {}
        codes = ("Q", "i", "i", "H", "I", "I", "I")
        self._columns = _Columns(*(array(code) for code in codes))

    def add_bad(self, place: Place, mistake: str, excerpt: str = "") -> None:
        """Counts a row that is not of its format."""
        self._source(place).update(rows=1, bad_rows=1)
        self.findings.add("bad_row", mistake, place, detail=excerpt)

    def add(self, facts: RowFacts, place: Place) -> bool:
        """Counts a row of its format; returns whether it can be trained on."""
        counts = self._source(place)
        counts.update(rows=1, turns=facts.turns, tokens=facts.tokens, trained_tokens=facts.trained)
        for name in facts.empty:
            self.findings.add("empty", f"empty `{name}`", place)
        for text in facts.roles:
            self.findings.add("roles", text, place)
        if facts.has_marks:
            text = "special tokens are written out in the text, and read as such"
            self.findings.add("special_tokens", text, place)
        if facts.unknown:
            self.findings.add("unknown_tokens", "text outside of the vocabulary", place)
        flags = {
            "empty": bool(facts.empty),
            "role_mistakes": bool(facts.roles),
            "special_tokens": facts.has_marks,
            "unknown_tokens": facts.unknown > 0,
            "system_prompts": facts.system is not None,
        }
        counts.update({name: 1 for name, is_set in flags.items() if is_set})
        if facts.system is not None:
            self._systems.add(facts.system)
        self.max_turns = max(self.max_turns, facts.turns)
        kept = self._fit(facts, place, counts)
        self._remember(facts, place, kept)
        return kept > 0

    def _fit(self, facts: RowFacts, place: Place, counts: Counter[str]) -> int:
        """Counts what ``data.seq_len`` does to the row; returns its tokens in training, maybe 0."""
        seq_len, policy = self.options.seq_len, self.options.truncation
        if facts.mistake:
            counts.update(unrenderable=1)
            self.findings.add("unrenderable", facts.mistake, place)
            return 0
        length = f"{facts.tokens:,} tokens"
        if facts.tokens > seq_len and policy in ("drop", "error"):
            counts.update(too_long=1)
            kind = "too_long" if policy == "drop" else "over_limit"
            self.findings.add(kind, f"longer than `data.seq_len: {seq_len}`", place, detail=length)
            return 0
        if facts.tokens > seq_len:
            counts.update(cut=1)
            text = f"longer than `data.seq_len: {seq_len}`: cut"
            self.findings.add("cut", text, place, detail=length)
        if not facts.trained_kept:
            counts.update(untrained=1)
            cut = ", once it is cut" if facts.trained else ""
            self.findings.add("untrained", f"no token that carries loss{cut}", place)
            return 0
        kept = min(facts.tokens, seq_len)
        counts.update(usable=1, kept_tokens=kept, kept_trained_tokens=facts.trained_kept)
        return kept

    def finish(self, held_out: Iterable[int] = ()) -> dict[str, Any]:
        """Returns everything as plain data, findings of duplicates included.

        Args:
            held_out: of the usable rows to train on, by their order, those held out.
        """
        source = _numpy(self._columns.source)
        is_eval = source >= self.num_train
        usable = np.flatnonzero((_numpy(self._columns.kept) > 0) & ~is_eval)
        is_eval[usable[np.fromiter(held_out, dtype=np.int64)]] = True
        self._find_duplicates(is_eval)
        total: Counter[str] = Counter()
        for index, counts in self.counts.items():
            if index < self.num_train:
                total.update(counts)
        return {
            "counts": {name: total[name] for name in COUNTS},
            "by_source": defaultdict(
                lambda: dict.fromkeys(COUNTS, 0),
                {
                    index: {name: counts[name] for name in COUNTS}
                    for index, counts in self.counts.items()
                },
            ),
            "conversations": {
                "mean_turns": total["turns"] / max(1, total["rows"] - total["bad_rows"]),
                "max_turns": self.max_turns,
                "distinct_system_prompts": len(self._systems),
            },
            "held_out": {
                "rows": int(np.count_nonzero(is_eval)),
                "in_training": self.findings.count("held_out_duplicate"),
            },
            "findings": self.findings.as_json(),
        }

    def lengths(self) -> npt.NDArray[np.int32]:
        """Returns the tokens of every rendered row to train on, before it is cut, ``(rows,)``."""
        tokens = _numpy(self._columns.tokens)
        return tokens[(tokens > 0) & (_numpy(self._columns.source) < self.num_train)]

    def kept_lengths(self) -> npt.NDArray[np.int64]:
        """Returns the tokens of every usable row to train on, cut, ``(rows,)``."""
        kept = _numpy(self._columns.kept)
        is_train = _numpy(self._columns.source) < self.num_train
        return kept[(kept > 0) & is_train].astype(np.int64)

    def kept_sources(self) -> npt.NDArray[np.int64]:
        """Returns the source of every usable row to train on, ``(rows,)``."""
        source, kept = _numpy(self._columns.source), _numpy(self._columns.kept)
        return source[(kept > 0) & (source < self.num_train)].astype(np.int64)

    def _find_duplicates(self, is_eval: npt.NDArray[np.bool_]) -> None:
        """Finds rows that repeat one before them: within training, and held-out ones in it."""
        prints, rows = _numpy(self._columns.fingerprints), np.arange(len(is_eval))
        first_of: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
        train = rows[~is_eval]
        values, first, inverse = np.unique(prints[train], return_index=True, return_inverse=True)
        first_of["duplicate"] = (train, train[first[inverse]])
        held_out = rows[is_eval]
        if len(values) and len(held_out):
            place = np.minimum(np.searchsorted(values, prints[held_out]), len(values) - 1)
            seen = values[place] == prints[held_out]
            first_of["held_out_duplicate"] = (held_out[seen], train[first[place[seen]]])
        texts = {
            "duplicate": "the same as an earlier row",
            "held_out_duplicate": "held out for evaluation, and trained on too",
        }
        for kind, (repeats, originals) in first_of.items():
            for repeat, original in zip(repeats, originals, strict=True):
                if repeat != original:
                    place_of = self._place(int(repeat))
                    same = self._name(int(original), beside=place_of.file)
                    self.findings.add(kind, texts[kind], place_of, detail=same)
                    if kind == "duplicate":
                        self._source(place_of).update(duplicates=1)

    def _remember(self, facts: RowFacts, place: Place, kept: int) -> None:
        columns = self._columns
        columns.fingerprints.append(facts.fingerprint)
        columns.tokens.append(facts.tokens)
        columns.kept.append(kept)
        columns.source.append(place.source)
        columns.file.append(self._files.setdefault(place.file, len(self._files)))
        columns.row.append(place.row)
        columns.line.append(place.line)

    def _place(self, index: int) -> Place:
        columns = self._columns
        file = list(self._files)[columns.file[index]]
        return Place(columns.source[index], file, columns.row[index], columns.line[index])

    def _name(self, index: int, *, beside: str) -> str:
        """Returns which row it is, for people who look at one of the file ``beside``."""
        place = self._place(index)
        line = f" (line {place.line})" if place.line not in (0, place.row) else ""
        of_file = f" of {Path(place.file).name}" if place.file != beside else ""
        return f"row {place.row}{line}{of_file}"

    def _source(self, place: Place) -> Counter[str]:
        return self.counts.setdefault(place.source, Counter())


def _numpy(column: array[int]) -> npt.NDArray[Any]:
    return np.array(column)
