"""Examines the rows of a recipe as training would read them, and says so as JSON; no weights.

One pass: rows are read, rendered and tokenized in batches, and only their facts are kept. A bad row
is counted instead of raised, all of them, because the counts by kind are what one looks for.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdpq.data.inspection.advice import advise
from fsdpq.data.inspection.facts import RowExaminer, cut_row
from fsdpq.data.inspection.findings import ERRORS, SKIPPED, Place
from fsdpq.data.inspection.lengths import describe_lengths
from fsdpq.data.inspection.packing import describe_packing
from fsdpq.data.inspection.samples import Reservoir, segments, token_table
from fsdpq.data.inspection.totals import Totals
from fsdpq.data.loader import split_rows
from fsdpq.data.render import TemplateError
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.tokenize import Row, RowTokenizer
from fsdpq.errors import UsageError
from fsdpq.model.meta import read_config
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.rows.read import check_rows
from fsdpq.rows.source import DataSources, RowSource
from fsdpq.run_files import RunFiles
from fsdpq.worker.assemble import Inputs, load_tokenizer, read_inputs

INSPECTION_FORMAT = 1
BATCH_ROWS = 500
_EXCERPT = 160


@dataclass(frozen=True)
class Wanted:
    """What to show of single rows.

    Attributes:
        num_samples: rows drawn to be shown.
        file: path of the file of the one row to show, empty for none.
        row: its number in that file.
    """

    num_samples: int = 0
    file: str = ""
    row: int = 0


@dataclass(frozen=True)
class PlacedRow:
    """A row and where it was read; ``content`` is empty where it has a ``mistake``."""

    place: Place
    content: Mapping[str, Any]
    mistake: str = ""
    excerpt: str = ""


def inspect(files: RunFiles, wanted: Wanted, *, trust_remote_code: bool = False) -> None:
    """Writes the content of an inspection to stdout, as JSON.

    Args:
        files: a resolved recipe and a lock that names the tokenizer's directory and the data.
        wanted: rows to show.
        trust_remote_code: run code that the model brings.

    Raises:
        UsageError: there is no such row.
        RecipeError: the tokenizer cannot give exact masks.
    """
    recipe = load_resolved(files.resolved)
    inputs = read_inputs(files, trust_remote_code=trust_remote_code)
    content = Inspection(recipe, inputs, wanted).run()
    sys.stdout.write(json.dumps(content, ensure_ascii=True) + "\n")


class Inspection:
    """One pass over all rows of a recipe.

    Args:
        recipe: resolved.
        inputs: the tokenizer's directory and the data.
        wanted: rows to show.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, wanted: Wanted) -> None:
        if inputs.data is None:
            raise RuntimeError("these inputs name no data")
        self.recipe, self.options, self.inputs, self.wanted = recipe, recipe.data, inputs, wanted
        self.data: DataSources = inputs.data
        self.tokenizer: Any = load_tokenizer(
            inputs.model_dir, trust_remote_code=inputs.trust_remote_code
        )
        self.template = choose_template(self.tokenizer, self.options.chat_template)
        self.totals = Totals(self.options, len(self.data.train))
        self.samples: Reservoir[tuple[Place, Row]] = Reservoir(
            wanted.num_samples, recipe.training.seed
        )
        self.shown: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Returns the content: everything that is shown, as plain data."""
        sources = [*self.data.train, *([self.data.eval] if self.data.eval else [])]
        for index, source in enumerate(sources):
            self._read_source(index, source)
        if self.wanted.file and self.shown is None:
            message = f"`{self.wanted.file}` has no row {self.wanted.row}"
            raise UsageError(message, hint="`fsdpq data inspect` without `--row` counts them")
        return self._content(sources)

    def _read_source(self, index: int, source: RowSource) -> None:
        row_tokenizer = RowTokenizer(
            self.tokenizer, self.options, source.format, template=self.template
        )
        examiner = RowExaminer(row_tokenizer)
        rows = iter(read_placed(index, source))
        if self.options.streaming:
            rows = itertools.islice(rows, self.options.stream_window)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            for row in batch:
                if row.mistake:
                    self.totals.add_bad(row.place, row.mistake, row.excerpt)
                    self._show_bad(row)
            self._add([row for row in batch if not row.mistake], examiner)

    def _add(self, rows: list[PlacedRow], examiner: RowExaminer) -> None:
        facts, tokenized = examiner.examine([row.content for row in rows])
        for row, found, done in zip(rows, facts, tokenized, strict=True):
            self.totals.add(found, row.place)
            self._show(row, done)
            is_train = row.place.source < self.totals.num_train
            if is_train and not isinstance(done, TemplateError) and found.trained_kept:
                place = self.samples.place()
                if place is not None:
                    self.samples.put(place, (row.place, done))

    def _show_bad(self, row: PlacedRow) -> None:
        if self._is_wanted(row.place):
            self.shown = {"place": vars(row.place), "mistake": row.mistake}
            self.shown |= {"content": row.excerpt, "segments": [], "tokens": []}

    def _show(self, row: PlacedRow, done: Row | TemplateError) -> None:
        if not self._is_wanted(row.place):
            return
        rendered = not isinstance(done, TemplateError)
        self.shown = {
            "place": vars(row.place),
            "mistake": "" if rendered else str(done),
            "content": json.dumps(row.content, indent=2, ensure_ascii=False, default=str),
            "num_tokens": len(done.input_ids) if rendered else 0,
            "num_trained": done.num_trained if rendered else 0,
            "segments": segments(done, self.tokenizer) if rendered else [],
            "tokens": token_table(done, self.tokenizer) if rendered else [],
        }

    def _is_wanted(self, place: Place) -> bool:
        return (place.file, place.row) == (self.wanted.file, self.wanted.row)

    def _content(self, sources: list[RowSource]) -> dict[str, Any]:
        totals, options = self.totals, self.options
        kept = totals.kept_lengths()
        held_out: list[int] = []
        if options.eval_fraction and len(kept) > 1:
            held_out = split_rows(len(kept), options.eval_fraction, self.recipe.training.seed)[1]
        found = totals.finish(held_out)
        counts = {index: found["sources"].get(index, {}) for index in range(len(sources))}
        content: dict[str, Any] = {
            "format": INSPECTION_FORMAT,
            "recipe": self.recipe.name,
            "model": {
                "name_or_path": self.recipe.model.name_or_path,
                "context": _context(self.inputs),
                "template": self.template.name if self.template else None,
            },
            "data": _settings(self.recipe),
            "sources": [
                _describe_source(source, counts[index], is_eval=index >= len(self.data.train))
                for index, source in enumerate(sources)
            ],
            "counts": found["counts"],
            **{name: found[name] for name in ("conversations", "held_out", "findings")},
            "ok": not totals.findings.count(*self._errors()) and len(kept) > 0,
            "lengths": describe_lengths(totals.lengths(), options.seq_len),
            "packing": describe_packing(np.delete(kept, held_out), self.recipe),
            "samples": [self._describe_sample(*sample) for sample in self.samples.items],
            "row": self.shown,
        }
        return content | {"notes": advise(content)}

    def _errors(self) -> tuple[str, ...]:
        """The kinds of findings that end a run."""
        skips = self.options.on_bad_row == "skip"
        return tuple(kind for kind in ERRORS if not (skips and kind in SKIPPED))

    def _describe_sample(self, place: Place, row: Row) -> dict[str, Any]:
        kept = cut_row(row, self.options)
        return {
            "place": vars(place),
            "num_tokens": len(row.input_ids),
            "num_trained": row.num_trained,
            "num_kept": len(kept.input_ids),
            "segments": segments(kept, self.tokenizer),
        }


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


def _settings(recipe: Recipe) -> dict[str, Any]:
    names = (
        "seq_len", "truncation", "packing", "on_bad_row", "train_on_prompt", "eval_fraction",
        "streaming", "stream_window",
    )  # fmt: skip
    return {name: getattr(recipe.data, name) for name in names}


def _describe_source(source: RowSource, counts: Any, *, is_eval: bool) -> dict[str, Any]:
    return {
        "name": source.name,
        "use": "evaluation" if is_eval else "training",
        "format": source.format,
        "files": [str(file.path) for file in source.files],
        "format_why": "",
        "weight": source.weight,
        "counts": dict(counts),
    }


def _context(inputs: Inputs) -> int | None:
    """The most tokens that the model was made for, None where its config does not say."""
    if not (inputs.model_dir / "config.json").is_file():
        return None
    config = read_config(inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None
