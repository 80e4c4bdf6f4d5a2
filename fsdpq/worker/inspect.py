"""Examines the rows of a recipe as training would read them, and writes it as JSON; no weights.

One pass: rows are read here, rendered and tokenized in batches in several processes, and only their
facts are kept. A bad row is counted instead of raised, all of them, because the counts by kind are
what one looks for.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsdpq.data.dealing.loader import split_rows
from fsdpq.data.inspection.advice import advise, find_errors
from fsdpq.data.inspection.facts import RowExaminer, kept_row
from fsdpq.data.inspection.lengths import describe_lengths
from fsdpq.data.inspection.packing import describe_packing
from fsdpq.data.inspection.reading import PlacedRow, choose_epoch, read_batches
from fsdpq.data.inspection.samples import Reservoir, segments, token_table
from fsdpq.data.inspection.totals import Totals
from fsdpq.data.preparing.processes import map_in_order
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.errors import UsageError
from fsdpq.model.config import read_config
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.rows.source import DataSources, RowSource
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.worker.prepare import progress_printer
from fsdpq.worker.tokenizer import load_tokenizer

INSPECTION_FORMAT = 1


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
class RowInputs:
    """Where the launcher put what is looked at.

    Attributes:
        model_dir: the model, or its tokenizer and config alone.
        data: where the rows are.
        trust_remote_code: run Python code that the model brings; from the command line only.
    """

    model_dir: Path
    data: DataSources
    trust_remote_code: bool = False


def inspect(
    files: RunFiles,
    wanted: Wanted,
    *,
    output: Path,
    num_processes: int = 1,
    trust_remote_code: bool = False,
) -> None:
    """Writes the content of an inspection to ``output``, as JSON.

    Prints how far it is, as lines of JSON: ``done_rows``, ``total_rows`` (0: not known).

    Args:
        files: a resolved recipe and a lock that names the tokenizer's directory and the data.
        wanted: rows to show.
        output: the file.
        num_processes: that tokenize.
        trust_remote_code: run code that the model brings.

    Raises:
        UsageError: there is no such row.
        RecipeError: the tokenizer cannot give exact masks.
        LaunchError: a process that tokenizes died.
    """
    recipe = load_resolved(files.resolved)
    found = json.loads(files.lock.read_text(encoding="utf-8"))["inputs"]
    model_dir, data = Path(found["model"]["directory"]), DataSources.from_json(found["data"])
    inputs = RowInputs(model_dir, data, trust_remote_code)
    content = Inspection(recipe, inputs, wanted, num_processes=num_processes).run()
    write_whole(output, json.dumps(content, ensure_ascii=True, allow_nan=False).encode())


class Inspection:
    """One pass over all rows of a recipe.

    Args:
        recipe: resolved.
        inputs: the tokenizer's directory and the data.
        wanted: rows to show.
        num_processes: that tokenize.
    """

    def __init__(
        self, recipe: Recipe, inputs: RowInputs, wanted: Wanted, *, num_processes: int = 1
    ) -> None:
        self.recipe, self.options, self.inputs, self.wanted = recipe, recipe.data, inputs, wanted
        self.num_processes, self.data = num_processes, inputs.data
        self.tokenizer: Any = load_tokenizer(
            inputs.model_dir, trust_remote_code=inputs.trust_remote_code
        )
        self.template = choose_template(
            self.tokenizer, self.options.chat_template, self.data.chat_template
        )
        self.sources = inputs.data.every
        self.row_tokenizers = [
            RowTokenizer(self.tokenizer, self.options, source.format, template=self.template)
            for source in self.sources
        ]
        self.totals = Totals(self.options, len(self.data.train))
        self.samples: Reservoir[PlacedRow] = Reservoir(wanted.num_samples, recipe.training.seed)
        self.shown: PlacedRow | None = None

    def run(self) -> dict[str, Any]:
        """Returns the content: everything that is shown, as plain data."""
        report, num_done = progress_printer(), 0
        formats = [source.format for source in self.sources]
        examiner = RowExaminer(self.tokenizer, self.row_tokenizers, formats, self.options)
        taken: deque[list[PlacedRow]] = deque()

        def payloads() -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
            for batch in read_batches(self.sources, self.options):
                taken.append(batch)
                yield batch[0].place.source, [row.content for row in batch if not row.mistake]

        for facts in map_in_order(examiner, payloads(), num_processes=self.num_processes):
            batch, found = taken.popleft(), iter(facts)
            for row in batch:
                self._take(row, None if row.mistake else next(found))
            num_done += len(batch)
            report(num_done, 0)
        if self.wanted.file and self.shown is None:
            message = f"`{self.wanted.file}` has no row {self.wanted.row}"
            raise UsageError(message, hint="`fsdpq data inspect` without `--row` counts them")
        return self._content()

    def _take(self, row: PlacedRow, facts: Any) -> None:
        if (row.place.file, row.place.row) == (self.wanted.file, self.wanted.row):
            self.shown = row
        if facts is None:
            self.totals.add_bad(row.place, row.mistake, row.excerpt)
            return
        is_usable = self.totals.add(facts, row.place)
        if is_usable and row.place.source < self.totals.num_train:
            place = self.samples.place()
            if place is not None:
                self.samples.put(place, row)

    def _content(self) -> dict[str, Any]:
        totals, options = self.totals, self.options
        kept = totals.kept_lengths()
        held_out = self._held_out(len(kept))
        found = totals.finish(held_out)
        counts = found.pop("by_source")
        epoch = choose_epoch(self.recipe, self.data.train, totals.kept_sources(), held_out)
        per_source = np.bincount(totals.kept_sources()[epoch], minlength=totals.num_train)
        epoch_rows = [*per_source.tolist(), None]
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
                _describe_source(source, counts[index], epoch_rows[index])
                for index, source in enumerate(self.sources)
            ],
            **found,
            "lengths": describe_lengths(totals.lengths(), options.seq_len),
            "packing": describe_packing(kept[epoch], self.recipe),
            "samples": [self._describe(row) for row in self.samples.items],
            "row": self._describe_shown(),
        }
        errors = find_errors(content, skips_bad_rows=options.on_bad_row == "skip")
        return {"ok": not errors, "errors": errors, **content, "notes": advise(content)}

    def _held_out(self, num_rows: int) -> list[int]:
        """Returns which of the usable rows are held out, as preparing the data chooses them."""
        fraction = self.options.eval_fraction
        if not fraction or self.data.eval is not None or num_rows < 2:
            return []
        return split_rows(num_rows, fraction, self.recipe.training.seed)[1]

    def _tokenize(self, row: PlacedRow) -> Row | TemplateError:
        return self.row_tokenizers[row.place.source].tokenize([row.content])[0]

    def _describe(self, row: PlacedRow) -> dict[str, Any]:
        tokens = self._tokenize(row)
        if isinstance(tokens, TemplateError):
            raise RuntimeError(f"a row was rendered once and is refused now: {tokens}")
        kept = kept_row(tokens, self.options)
        return {
            "place": vars(row.place),
            "num_tokens": len(tokens.input_ids),
            "num_trained": tokens.num_trained,
            "num_kept": len(kept.input_ids),
            "segments": segments(kept, self.tokenizer),
        }

    def _describe_shown(self) -> dict[str, Any] | None:
        row = self.shown
        if row is None:
            return None
        tokens = None if row.mistake else self._tokenize(row)
        shown: dict[str, Any] = {
            "place": vars(row.place),
            "mistake": row.mistake,
            "content": row.excerpt,
            "num_tokens": 0,
            "num_trained": 0,
            "segments": [],
            "tokens": [],
        }
        if not row.mistake:
            shown["content"] = json.dumps(row.content, indent=2, ensure_ascii=False, default=str)
        if isinstance(tokens, TemplateError):
            shown["mistake"] = str(tokens)
        elif tokens is not None:
            shown |= {
                "num_tokens": len(tokens.input_ids),
                "num_trained": tokens.num_trained,
                "segments": segments(tokens, self.tokenizer),
                "tokens": token_table(tokens, self.tokenizer),
            }
        return shown


def _settings(recipe: Recipe) -> dict[str, Any]:
    names = (
        "seq_len", "truncation", "packing", "on_bad_row", "train_on_prompt", "eval_fraction",
        "streaming", "stream_window",
    )  # fmt: skip
    return {name: getattr(recipe.data, name) for name in names}


def _describe_source(
    source: RowSource, counts: Mapping[str, int], epoch_rows: int | None
) -> dict[str, Any]:
    return {
        "name": source.name,
        "use": "evaluation" if epoch_rows is None else "training",
        "epoch_rows": epoch_rows,
        "format": source.format,
        "files": [str(file.path) for file in source.files],
        "format_why": source.format_why,
        "weight": source.weight,
        "counts": dict(counts),
    }


def _context(inputs: RowInputs) -> int | None:
    """The most tokens that the model was made for, None where its config does not say."""
    if not (inputs.model_dir / "config.json").is_file():
        return None
    config = read_config(inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None
