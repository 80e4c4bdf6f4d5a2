"""The results of a sweep in a terminal: an aligned table that fits, and what went wrong."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

import click

from fsdpq.cli.render import clean
from fsdpq.sweep.results.leaderboard import (
    Column,
    Trouble,
    build_columns,
    counts_line,
    list_troubles,
)
from fsdpq.sweep.results.results import Results

MOST_ROWS = 20
MOST_TROUBLES = 8
LONG_CELL = 20
LEAST_CELL = 8
"""Characters that a setting keeps when the table is cut to fit: before measures go, and after."""

GAP = 2
MARK = "* "
OTHER = "  "
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


def render_leaderboard(results: Results, *, width: int = 100) -> Iterator[str]:
    """Yields the lines of the table, the best trial marked, and of what has no rank.

    Colours are ANSI codes; `fsdpq.cli.options.say` takes them out where they are not wanted.

    Args:
        results: of the sweep.
        width: characters of a line.
    """
    yield counts_line(results)
    columns = _fit(build_columns(results, most=MOST_ROWS), width - len(MARK))
    if results.trials:
        yield ""
        yield OTHER + _line([column.title for column in columns], columns)
    for index, trial in enumerate(results.trials[:MOST_ROWS]):
        line = _line([column.cells[index] for column in columns], columns)
        is_best = trial.rank == 1
        yield click.style(MARK + line, bold=True, fg="green") if is_best else OTHER + line
    if len(results.trials) > MOST_ROWS:
        yield OTHER + f"and {len(results.trials) - MOST_ROWS} more in results.csv"
    troubles = list_troubles(results)
    if troubles:
        yield ""
    for trouble in troubles[:MOST_TROUBLES]:
        yield from _render_trouble(trouble, width)
    if len(troubles) > MOST_TROUBLES:
        yield f"and {len(troubles) - MOST_TROUBLES} more reasons in results.csv"


def _render_trouble(trouble: Trouble, width: int) -> Iterator[str]:
    first, num_more = trouble.trials[0], len(trouble.trials) - 1
    who = first.id + (f" ({first.label})" if first.label else "")
    more = f" and {num_more} more" if num_more else ""
    color = {"failed": "red", "interrupted": "yellow", "hopeless": "yellow"}.get(trouble.status)
    head = click.style(trouble.status, fg=color)
    room = width - len(trouble.status) - len(more) - 2
    yield f"{head}  {_crop(clean(who), room)}{more}"
    if trouble.reason:
        yield f"  {clean(trouble.reason)}"


def _fit(columns: Sequence[Column], width: int) -> list[Column]:
    """Returns the columns in ``width`` characters.

    Long settings are cut first; then measures go, from the right, all but the first, which is the
    goal's; then settings are cut to the least; then they go too.
    """
    kept = _cut_settings(columns, width, least=LONG_CELL)
    measures = [column for column in kept if column.sort == "measure"]
    while _total(kept) > width and len(measures) > 1:
        kept.remove(measures.pop())
    kept = _cut_settings(kept, width, least=LEAST_CELL)
    settings = [column for column in kept if column.sort == "setting"]
    while _total(kept) > width and len(settings) > 1:
        kept.remove(settings.pop())
    return kept


def _cut_settings(columns: Sequence[Column], width: int, *, least: int) -> list[Column]:
    """Returns the columns, the widest settings cut until all fit or have ``least`` characters."""
    cut = list(columns)
    settings = [index for index, column in enumerate(cut) if column.sort == "setting"]
    while settings and _total(cut) > width:
        widest = max(settings, key=lambda index: _width(cut[index]))
        if _width(cut[widest]) <= least:
            break
        cut[widest] = _cut(cut[widest], _width(cut[widest]) - 1)
    return cut


def _cut(column: Column, width: int) -> Column:
    cells = tuple(_crop(cell, width) for cell in column.cells)
    return replace(column, title=_crop(column.title, width), cells=cells)


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    padded: list[str] = []
    for cell, column in zip(cells, columns, strict=True):
        spaces = " " * (_width(column) - _columns(cell))
        padded.append(spaces + cell if column.right else cell + spaces)
    return (" " * GAP).join(padded).rstrip()


def _total(columns: Sequence[Column]) -> int:
    return sum(_width(column) for column in columns) + GAP * (len(columns) - 1)


def _width(column: Column) -> int:
    return max(map(_columns, (column.title, *column.cells)))


def _columns(text: str) -> int:
    """Returns how many columns of a terminal ``text`` takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _crop(text: str, width: int) -> str:
    """Returns ``text`` in at most ``width`` columns: its start and its end, which differ most."""
    if _columns(text) <= width:
        return text
    head, tail = "", ""
    room = max(1, width) - 1
    for count in range(len(text)):
        front = count % 2 == 0
        more = text[len(head)] if front else text[-len(tail) - 1]
        if _columns(head + tail + more) > room:
            break
        head, tail = (head + more, tail) if front else (head, more + tail)
    return head + ELLIPSIS + tail
