"""Rows of ``fsdpq train --smoke``: made up in the formats of the recipe's sources.

Every part of a mixture and the source for evaluation get rows of their own, under the names that
their formats have; what ``columns``, ``split`` and the like choose is nothing here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from fsdpq.fetch.cache import cached_directory
from fsdpq.fetch.template_file import read_template_file
from fsdpq.launch.inputs.shrink import NUM_ROWS
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.source import MixturePart, SourceOptions
from fsdpq.rows.examples import made_up_rows
from fsdpq.rows.formats import DUMMY_ROWS
from fsdpq.rows.source import DataSources, RowSource, SourceFile

MAKER_VERSION = "2"
"""Raise it when `made_up_rows` makes other rows."""

STANDS_FOR_AUTO = "messages"
"""Format of made-up rows where the recipe's are told from their columns."""

ROWS = "rows.jsonl"

Report = Callable[[str], None]


def make_smoke_rows(options: DataOptions, *, base_dir: Path, report: Report) -> DataSources:
    """Returns made-up rows in the formats of the recipe's sources, and its own chat template.

    Args:
        options: the recipe's ``data``.
        base_dir: what the path of a template is relative to.
        report: told one short line per thing done.
    """
    parts: tuple[SourceOptions, ...] = options.mixture or (options,)
    keys = [f"data.mixture.{index}" for index in range(len(options.mixture))] or ["data"]
    train = tuple(_make(part, key, report) for part, key in zip(parts, keys, strict=True))
    held_out = None if options.eval is None else _make(options.eval, "data.eval", report)
    template = read_template_file(options, base_dir=base_dir)
    return DataSources(train, held_out, chat_template=template)


def _make(options: SourceOptions, key: str, report: Report) -> RowSource:
    if options.format == "dummy":
        return RowSource("made up", (), "dummy", DUMMY_ROWS, key=key)
    name = STANDS_FOR_AUTO if options.format == "auto" else options.format
    rows = made_up_rows(name, NUM_ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]

    def build(draft: Path) -> None:
        (draft / ROWS).write_text(lines, encoding="utf-8")

    entry = cached_directory(
        f"smoke/{name}-{digest}", build, converter=MAKER_VERSION, report=report
    )
    shown = options.dataset or options.path
    shown = shown if isinstance(shown, str) else ", ".join(shown or ())
    of = f"rows of `{name}`" if options.format == "auto" else "rows"
    report(f"smoke: made-up {of} stand in for {shown}")
    files = (SourceFile(entry.directory / ROWS, entry.files[ROWS]),)
    weight = options.weight if isinstance(options, MixturePart) else None
    return RowSource("made up", files, name, len(rows), weight=weight, key=key)
