"""Text of rows on a terminal: nothing in it can move the cursor, hide, or turn the line around.

Data is untrusted. Control characters, escape sequences, direction marks and invisible characters
are shown as what they are; letters of right-to-left scripts and wide ones stay, and their width is
counted.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import click

LINE_END = "↵"
OPEN, CLOSE = "⟦", "⟧"
"""Around trained text where there is no colour."""

_KEPT = "\u200c\u200d\u3000"
"""No word joiners of Persian, Indic scripts and emoji, and the wide space of CJK: harmless."""


@dataclass(frozen=True)
class Run:
    """Text of one look."""

    text: str
    trained: bool = False
    special: bool = False


def visible(text: str) -> str:
    """Returns ``text`` with every character that is not one to look at replaced by its name."""
    return "".join(c if c.isprintable() or c in _KEPT else _name(c) for c in text)


def encodable(text: str, stream: TextIO) -> str:
    """Returns ``text`` with what the encoding of ``stream`` lacks as escapes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def width(text: str) -> int:
    """Returns the columns that ``text`` takes on a terminal."""
    return sum(_columns(character) for character in text)


def cut(text: str, columns: int) -> str:
    """Returns ``text`` in so many columns at most, with an ellipsis where some is missing."""
    if width(text) <= columns:
        return text
    kept, taken = "", 1
    for character in text:
        taken += _columns(character)
        if taken > columns:
            break
        kept += character
    return kept + "…"


def sample_lines(
    segments: Sequence[Mapping[str, Any]], *, columns: int, max_lines: int, color: bool
) -> Iterator[str]:
    """Yields the lines of a row's stretches of text, trained ones marked.

    Args:
        segments: ``text``, ``trained`` and ``special`` of each.
        columns: longer lines are folded.
        max_lines: more of them are left out, and counted.
        color: mark by colour; else by brackets.
    """
    lines = [folded for line in _lines(segments) for folded in _fold(line, columns)]
    for line in lines[:max_lines]:
        yield "".join(_styled(run) for run in line) if color else _bracketed(line)
    if len(lines) > max_lines:
        yield f"({len(lines) - max_lines} more lines)"


def _name(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _lines(segments: Iterable[Mapping[str, Any]]) -> Iterator[list[Run]]:
    """Yields the lines of the text; a line's end is shown in its last run."""
    line: list[Run] = []
    for segment in segments:
        look = Run("", bool(segment["trained"]), bool(segment["special"]))
        *ended, last = str(segment["text"]).split("\n")
        for text in ended:
            yield [*line, replace(look, text=visible(text) + LINE_END)]
            line = []
        if last:
            line.append(replace(look, text=visible(last)))
    if line:
        yield line


def _fold(line: Sequence[Run], columns: int) -> Iterator[list[Run]]:
    folded: list[Run] = []
    room = columns
    for run in line:
        start = 0
        for place, character in enumerate(run.text):
            taken = _columns(character)
            if taken > room:
                yield [*folded, replace(run, text=run.text[start:place])]
                folded, start, room = [], place, columns
            room -= taken
        folded.append(replace(run, text=run.text[start:]))
    yield folded


def _styled(run: Run) -> str:
    if run.trained:
        return click.style(run.text, fg="green", bold=run.special or None)
    return click.style(run.text, fg="bright_black") if run.special else run.text


def _bracketed(line: Sequence[Run]) -> str:
    text, is_open = "", False
    for run in line:
        if run.text and run.trained != is_open:
            text += OPEN if run.trained else CLOSE
            is_open = run.trained
        text += run.text
    return text + CLOSE * is_open
