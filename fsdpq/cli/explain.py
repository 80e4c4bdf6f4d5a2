"""The text and the JSON of ``fsdpq show --explain``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fsdpq.cli.render import clean, render_table
from fsdpq.recipe.explain import Explanation, value_text

_WIDTH = 96


def render_explanations(found: Sequence[Explanation], key: str) -> Iterator[str]:
    """Yields the lines about one key, or a table of the keys of a section."""
    if len(found) == 1 and found[0].key == key:
        yield from _render_one(found[0])
        return
    rows = [(f"{entry.key} = {_value(entry)}", entry.default, entry.source) for entry in found]
    yield from map(clean, render_table([("key", "default", "source"), *rows]))
    yield ""
    yield f"`--explain {found[0].key}` says more about one of them"


def explanation_fields(entry: Explanation) -> dict[str, Any]:
    """Returns ``entry`` as plain data for ``--json``."""
    fields = asdict(entry)
    return {**fields, "choices": list(entry.choices)}


def _render_one(entry: Explanation) -> Iterator[str]:
    yield clean(f"{entry.key} = {_value(entry)}")
    yield ""
    rows = [("source", entry.source), ("takes", entry.type), ("default", entry.default)]
    if entry.unit:
        rows.insert(2, ("unit", entry.unit))
    yield from map(clean, render_table(rows, indent="  "))
    yield ""
    yield from textwrap.wrap(entry.description, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _value(entry: Explanation) -> str:
    return value_text(entry.value) or '""'
