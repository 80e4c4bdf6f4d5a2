"""The text of ``fsdpq kinds``: what each section of a recipe can hold."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator

from fsdpq.cli.render import render_table
from fsdpq.errors import UsageError
from fsdpq.fetch.catalog import DATASETS, MODELS
from fsdpq.recipe.describe import default_text, describe_field, list_sections, list_words, suggest
from fsdpq.recipe.field_docs import field_doc
from fsdpq.recipe.options import Options
from fsdpq.registry import ROWS, Row

_CATALOGS = {
    "model": ("name_or_path", MODELS),
    "data": ("dataset", DATASETS),
}


def render_overview() -> Iterator[str]:
    """Yields every choice of every section, one line each."""
    for section in list_sections():
        lines = [*_render_rows(section), *_render_catalog(section)]
        if lines:
            yield from [section, *lines, ""]
    yield "`fsdpq kinds SECTION` lists the keys of a section, with their defaults"


def render_section(section: str) -> Iterator[str]:
    """Yields the kinds of ``section`` with their keys, types, defaults and meaning.

    Raises:
        UsageError: there is no such section.
    """
    sections = list_sections()
    if section not in sections:
        guess = suggest(section, sections)
        hint = f"did you mean `{guess}`?" if guess else f"the sections are {list_words(sections)}"
        raise UsageError(f"a recipe has no section `{section}`", hint=hint)
    rows = [row for row in ROWS if row.section == section]
    for row in rows:
        yield from [f"{section}: kind: {row.kind}", f"  {row.summary}{_needs(row)}", ""]
        yield from _render_fields(row.options)
    if not rows:
        yield from [f"{section}:", ""]
        yield from _render_fields(sections[section].kinds[""])
    yield from _render_catalog(section)


def _render_rows(section: str) -> list[str]:
    rows = [row for row in ROWS if row.section == section]
    cells = [(f"kind: {row.kind}", row.summary + _needs(row)) for row in rows]
    return list(render_table(cells, indent="  ")) if cells else []


def _render_catalog(section: str) -> list[str]:
    if section not in _CATALOGS:
        return []
    field, entries = _CATALOGS[section]
    cells = [
        (f"{field}: pypi:{name}", f"{entry.summary} ({entry.license}; {entry.package})")
        for name, entry in entries.items()
    ]
    return list(render_table(cells, indent="  "))


def _render_fields(options: type[Options]) -> Iterator[str]:
    for name, info in options.model_fields.items():
        if name == "kind":
            continue
        default = default_text(info)
        suffix = default if default == "required" else f"default {default}"
        yield f"  {name}: {describe_field(info).replace('`', '')} ({suffix})"
        text = field_doc(options, name)
        yield from textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      ")
    yield ""


def _needs(row: Row) -> str:
    missing = [name for name in row.requires if importlib.util.find_spec(name) is None]
    if not row.requires:
        return ""
    text = f" (needs {', '.join(row.requires)}"
    return text + (f"; not installed: {', '.join(missing)})" if missing else ")")
