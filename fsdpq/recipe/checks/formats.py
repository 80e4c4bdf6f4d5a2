"""Rules about ``data.format`` and ``data.columns``, of every source that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import sources_of
from fsdpq.recipe.describe import list_words, suggest
from fsdpq.recipe.format_columns import FORMAT_COLUMNS, column_names
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.source import SourceOptions


def check_columns_of_format(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A name in ``columns`` that is no column of the source's ``format``."""
    for key, source in sources_of(recipe):
        known = column_names(source.format)
        for name in source.columns:
            if name in known or source.format == "dummy":
                continue
            what = f"`{source.format}` has no" if source.format != "auto" else "no format has a"
            message = f"`{key}.columns`: {what} column `{name}`"
            yield Problem(message, f"{key}.columns.{name}", hint=_hint(name, source, known))


def _hint(name: str, source: SourceOptions, known: tuple[str, ...]) -> str:
    if source.columns[name] in known:
        return f"the format's name comes first: `{source.columns[name]}: {name}`"
    guess = suggest(name, known)
    return f"did you mean `{guess}`?" if guess else f"its columns are {list_words(known, 'and')}"


def check_columns_of_one_format(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """With ``format: auto``, names in ``columns`` that no single format has together."""
    for key, source in sources_of(recipe):
        names = set(source.columns)
        if source.format != "auto" or not names <= set(column_names("auto")):
            continue
        if not any(names <= set(known.all) for known in FORMAT_COLUMNS.values()):
            named = list_words(source.columns, "and")
            message = f"`{key}.columns`: no format has the columns {named} together"
            yield Problem(message, f"{key}.columns", hint="write the `format` of the rows")


CHECKS = (check_columns_of_format, check_columns_of_one_format)
