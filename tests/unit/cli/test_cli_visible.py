"""Hostile text on a terminal: seen, never obeyed."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

import pytest

from fsdpq.cli.visible import CLOSE, OPEN, cut, encodable, sample_lines, visible, width

STYLES = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = [
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x9b31m", "\r overwritten", "\u202e turned", "\x00\x7f",
    "\u2066iso\u2069", "\ud800 alone", "\ufeff", "\u2028", "\u00ad", "\U000e0041", "\x08\x08",
]  # fmt: skip


def segment(text: str, *, trained: bool = False, special: bool = False) -> dict[str, object]:
    return {"text": text, "trained": trained, "special": special}


def plain(*segments: dict[str, object], columns: int = 80, max_lines: int = 99) -> list[str]:
    return list(sample_lines(segments, columns=columns, max_lines=max_lines, color=False))


def test_no_character_of_unicode_controls_the_terminal() -> None:
    """Controls, formats, separators, surrogates, unassigned: all but joiners and a wide space."""
    allowed = {"\u200c", "\u200d", "\u3000", " "}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category[0] in "CZ":
            shown = visible(chr(code))
            assert shown in allowed or shown.isprintable(), hex(code)
            assert shown != chr(code) or shown in allowed, hex(code)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("color", [True, False])
def test_hostile_text_is_printable_lines(text: str, color: bool) -> None:
    parts = [segment(f"a{text}b", trained=True), segment(text, special=True)]
    for line in sample_lines(parts, columns=20, max_lines=50, color=color):
        assert STYLES.sub("", line).isprintable()
        line.encode("utf-8")


def test_letters_of_every_script_stay() -> None:
    text = "שלום العربية 你好 नमस्ते \U0001f469\u200d\U0001f4bb é \u0645\u06cc\u200c\u062e"
    assert visible(text) == text


def test_lines_are_marked_by_brackets_that_close_on_each_line() -> None:
    lines = plain(segment("ask\n"), segment("one\ntwo", trained=True), segment("<end>"))
    assert lines == ["ask↵", f"{OPEN}one↵{CLOSE}", f"{OPEN}two{CLOSE}<end>"]


def test_neighbours_that_are_trained_share_their_brackets() -> None:
    parts = segment("one", trained=True), segment("<end>", trained=True, special=True)
    assert plain(*parts) == [f"{OPEN}one<end>{CLOSE}"]


def test_colours_end_where_the_stretch_ends() -> None:
    parts = [segment("a"), segment("b", trained=True), segment("c")]
    [line] = sample_lines(parts, columns=80, max_lines=5, color=True)
    assert line == "a\x1b[32mb\x1b[0mc"


@pytest.mark.parametrize("text", ["x" * 95, "你好" * 40, "e\u0301" * 90, "a你" * 30, "ab\n" * 9])
def test_lines_are_folded_at_their_width(text: str) -> None:
    lines = plain(segment(text), columns=11)
    assert all(width(line) <= 11 for line in lines)
    joined = "".join(lines)
    assert joined.replace("↵", "\n") == text
    assert all(width(line) >= 10 for line in lines[:-1] if "↵" not in line)


def test_long_rows_are_shortened_with_their_count() -> None:
    lines = plain(segment("one\n" * 30), max_lines=10)
    assert (len(lines), lines[-1]) == (11, "(20 more lines)")


def test_width_counts_columns() -> None:
    assert (width("ab"), width("你好"), width("e\u0301"), width("\U0001f642")) == (2, 4, 1, 2)
    assert (cut("你好吗", 5), cut("abc", 3), width(cut("你好吗", 4)) <= 4) == ("你好…", "abc", True)


def test_terminals_without_the_characters_get_escapes() -> None:
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert encodable("│ ⟦é⟧", ascii_stream) == "\\u2502 \\u27e6\\xe9\\u27e7"
    assert encodable("│ é", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "│ é"
