"""The text of ``fsdpq kinds``: what each section of a recipe can hold."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.cli.render import render_table
from fsdpq.cli.row_formats import format_fields, render_examples, render_formats
from fsdpq.errors import UsageError
from fsdpq.fetch.catalog import DATASETS, MODELS
from fsdpq.recipe.describe import (
    default_text,
    describe_field,
    list_sections,
    list_words,
    nested_options,
    suggest,
)
from fsdpq.recipe.field_docs import field_doc
from fsdpq.recipe.options import Options
from fsdpq.registry import ROWS, Row, is_installed

_CATALOGS = {
    "model": ("name_or_path", MODELS),
    "data": ("dataset", DATASETS),
}


def render_overview() -> Iterator[str]:
    """Yields every choice of every section, one line each."""
    for section in list_sections():
        lines = [*_render_rows(section), *_render_catalog(section)]
        if section == "data":
            lines = [*render_formats(), *lines]
        if lines:
            yield from [section, *lines, ""]
    yield "`fsdpq kinds SECTION` lists the keys of a section, with their defaults"


def render_section(section: str) -> Iterator[str]:
    """Yields the kinds of ``section`` with their keys, types, defaults and meaning.

    Raises:
        UsageError: there is no such section.
    """
    options = _kinds_of(section)
    for kind, members in options.items():
        row = _row(section, kind)
        head = f"{section}: kind: {kind}" if kind else f"{section}:"
        yield from [head, *([f"  {row.summary}{_notes(row)}"] if row else []), ""]
        yield from _render_fields(section, members)
    if section == "data":
        yield from [*render_formats(), *render_examples(), ""]
    yield from _render_catalog(section)


def kinds_fields(section: str | None) -> list[dict[str, Any]]:
    """Returns every kind of ``section``, or of all sections, as plain data.

    Raises:
        UsageError: there is no such section.
    """
    sections = [section] if section else list(list_sections())
    return [
        _kind_fields(name, kind, options)
        for name in sections
        for kind, options in _kinds_of(name).items()
    ]


def _kinds_of(section: str) -> Mapping[str, type[Options]]:
    sections = list_sections()
    if section not in sections:
        guess = suggest(section, sections)
        hint = f"did you mean `{guess}`?" if guess else f"the sections are {list_words(sections)}"
        raise UsageError(f"a recipe has no section `{section}`", hint=hint)
    return sections[section].kinds


def _kind_fields(section: str, kind: str, options: type[Options]) -> dict[str, Any]:
    row = _row(section, kind)
    packages = row.requires if row else ()
    more = {"formats": format_fields()} if section == "data" else {}
    return {
        "section": section,
        "kind": kind or None,
        "summary": row.summary if row else "",
        "packages": [{"name": name, "installed": is_installed(name)} for name in packages],
        "keys": [
            {
                "key": f"{section}.{name}",
                "type": describe_field(info).replace("`", ""),
                "default": default_text(info),
                "description": field_doc(options, name),
            }
            for name, info in options.model_fields.items()
        ],
        **more,
    }


def _row(section: str, kind: str) -> Row | None:
    return next((row for row in ROWS if (row.section, row.kind) == (section, kind)), None)


def _render_rows(section: str) -> list[str]:
    rows = [row for row in ROWS if row.section == section]
    cells = [(f"kind: {row.kind}", row.summary + _notes(row)) for row in rows]
    return list(render_table(cells, indent="  ")) if cells else []


def _render_catalog(section: str) -> list[str]:
    if section not in _CATALOGS:
        return []
    field, entries = _CATALOGS[section]
    cells = [
        (f"{field}: pypi:{name}", f"{entry.summary} ({entry.license}; {entry.package})")
        for name, entry in entries.items()
    ]
    if section == "data":
        built_in = BUILT_IN_TEMPLATES.items()
        cells += [(f"chat_template: {name}", template.summary) for name, template in built_in]
    return list(render_table(cells, indent="  "))


def _render_fields(section: str, options: type[Options]) -> Iterator[str]:
    yield from _render_keys(section, options, "")
    yield ""


def _render_keys(section: str, options: type[Options], prefix: str) -> Iterator[str]:
    for name, info in options.model_fields.items():
        if name == "kind":
            continue
        default = default_text(info)
        suffix = default if default == "required" else f"default {default}"
        yield f"  {prefix}{name}: {describe_field(info).replace('`', '')} ({suffix})"
        text = field_doc(options, name)
        yield from textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      ")
        inner = nested_options(info)
        if inner is not None:
            yield from _render_keys(section, inner, f"{prefix}{name}.")


def _notes(row: Row) -> str:
    notes = [f"needs {', '.join(row.requires)}"] if row.requires else []
    missing = [name for name in row.requires if not is_installed(name)]
    notes += [f"not installed: {', '.join(missing)}"] if missing else []
    return f" ({'; '.join(notes)})" if notes else ""
