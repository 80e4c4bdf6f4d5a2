"""The formats of rows in ``fsdpq kinds``: their columns and how a row reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fsdpq.cli.render import render_table
from fsdpq.recipe.describe import list_words
from fsdpq.recipe.format_columns import FORMAT_COLUMNS
from fsdpq.rows.examples import EXAMPLES


def render_formats() -> Iterator[str]:
    """Yields the formats with their columns, one line each."""
    cells = [("format: auto", "told from the columns of the rows")]
    cells += [(f"format: {name}", _describe(name)) for name in FORMAT_COLUMNS]
    yield from render_table(cells, indent="  ")


def render_examples() -> Iterator[str]:
    """Yields a row of every format, as a line of a `.jsonl` file."""
    cells = [(name, EXAMPLES[name]) for name, known in FORMAT_COLUMNS.items() if known.needed]
    yield "  rows, as lines of a .jsonl file:"
    yield from render_table(cells, indent="    ")


def format_fields() -> list[dict[str, Any]]:
    """Returns the formats as plain data."""
    return [
        {
            "format": name,
            "columns": list(known.needed),
            "optional": list(known.optional),
            "fields": list(known.fields),
            "example": EXAMPLES[name],
        }
        for name, known in FORMAT_COLUMNS.items()
    ]


def _describe(name: str) -> str:
    known = FORMAT_COLUMNS[name]
    if not known.needed:
        return "made-up rows, no columns"
    may_lack = f"; {list_words(known.optional, 'and')} may be missing" if known.optional else ""
    note = f": {known.note}" if known.note else ""
    return (list_words(known.needed, "and") + note + may_lack).replace("`", "")
