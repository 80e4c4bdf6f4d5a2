"""Problems, errors and tables as text.

What a recipe or a model wrote may hold anything, so control characters are replaced before text
reaches a terminal.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import click

from fsdpq.errors import FsdpqError, Location, Problem, RecipeError

MAX_EXCERPT = 100
_MARGIN = 5


def wants_color(stream: TextIO) -> bool:
    """Returns whether ``stream`` is a terminal whose user has nothing against colour.

    ``NO_COLOR`` (https://no-color.org) has the last word; ``FORCE_COLOR`` colours a pipe too, for
    the logs of a CI that shows colours.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def render_error(error: FsdpqError) -> str:
    """Returns ``error`` as text; details (a traceback) come last."""
    if isinstance(error, RecipeError):
        return "\n\n".join(render_problem(problem) for problem in error.problems)
    lines = [_headline(error.message)]
    if error.hint:
        lines.append(_hint(error.hint))
    if error.details:
        lines += ["", clean(error.details, keep="\n\t")]
    return "\n".join(lines)


def render_problem(problem: Problem) -> str:
    """Returns ``problem`` with its place and an excerpt of the line."""
    lines = [_headline(problem.message)]
    if problem.location is not None:
        lines += _place(problem.location)
    if problem.hint:
        lines.append(_hint(problem.hint))
    return "\n".join(lines)


def render_notice(notice: str) -> str:
    """Returns what the user should know and is no mistake."""
    return click.style("note:", fg="cyan", bold=True) + " " + clean(notice)


def render_warning(warning: str) -> str:
    """Returns what the user should think about twice."""
    return click.style("warning:", fg="yellow", bold=True) + " " + clean(warning)


def problem_fields(problem: Problem) -> dict[str, Any]:
    """Returns ``problem`` as plain data for ``--json``."""
    place = problem.location
    location = None
    if place is not None:
        location = {
            "source": place.source,
            "line": place.line,
            "column": place.column,
            "text": place.text,
            "length": place.length,
        }
    return {
        "message": problem.message,
        "key": problem.key,
        "location": location,
        "hint": problem.hint,
    }


def render_table(rows: Iterable[Sequence[str]], *, indent: str = "") -> Iterator[str]:
    """Yields the lines of a table whose columns are as wide as they must be."""
    table = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield (indent + "  ".join(cells)).rstrip()


def clean(text: str, *, keep: str = "") -> str:
    """Returns ``text`` with every unprintable character but those in ``keep`` replaced."""
    return "".join(c if c.isprintable() or c in keep else _replacement(c) for c in text)


def _replacement(character: str) -> str:
    return " " if character == "\t" else "\N{REPLACEMENT CHARACTER}"


def _headline(message: str) -> str:
    return click.style("error:", fg="red", bold=True) + " " + clean(message, keep="\n")


def _hint(hint: str) -> str:
    return click.style("hint:", fg="cyan", bold=True) + " " + clean(hint)


def _place(location: Location) -> list[str]:
    if location.line == 0:
        text = f": {clean(location.text)}" if location.text else ""
        return [f"  --> {clean(location.source)}{text}"]
    lines = [f"  --> {clean(location.source)}:{location.line}:{location.column}"]
    text, start = _crop(location)
    if text.strip():
        number = f"{location.line:>{_MARGIN}}"
        padding = " " * (len(number) + 3 + _width(text[:start]))
        length = min(location.length, max(1, len(text) - start))
        carets = "^" * max(1, _width(text[start : start + length]))
        lines += [f"{number} | {text}", padding + click.style(carets, fg="red", bold=True)]
    return lines


def _crop(location: Location) -> tuple[str, int]:
    """Returns the part of the line around the mistake, and where the mistake starts in it."""
    text, start = location.text.rstrip(), location.column - 1
    first = max(0, start - MAX_EXCERPT // 2) if len(text) > MAX_EXCERPT else 0
    return clean(text[first : first + MAX_EXCERPT]), start - first


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
