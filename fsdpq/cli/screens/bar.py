"""The last line of a terminal, drawn over itself.

Nothing but carriage returns and blanks: that works in a terminal of any kind, in the cells of a
notebook (whose ``!command`` runs in a pseudo-terminal that few control sequences get through), and
a process that is killed leaves no hidden cursor behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import click

from fsdpq.cli.render import wants_color

DRAW_INTERVAL_S = 0.1
NOTEBOOK_INTERVAL_S = 1.0
"""A notebook keeps all that was ever drawn until the page handles it."""

BAR_WIDTH = 24
NARROW_WIDTH = 80
_NOTEBOOKS = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


@dataclass(frozen=True)
class Part:
    """A piece of the line.

    Attributes:
        text: what it says.
        need: the smaller, the longer it stays where the line is too long.
        is_bar: it may be coloured.
    """

    text: str
    need: int
    is_bar: bool = False


class BottomLine:
    """Draws one line over and over, and leaves room for others above it.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._interval_s = NOTEBOOK_INTERVAL_S if in_notebook() else DRAW_INTERVAL_S
        self._parts: Sequence[Part] = ()
        self._drawn = 0
        self._last = 0.0
        self._later: threading.Timer | None = None
        self._lock = threading.RLock()

    def draw(self, parts: Sequence[Part], *, is_last: bool = False) -> None:
        """Draws ``parts`` now, or where the line was drawn a moment ago, in a moment.

        Args:
            parts: of the line, in order.
            is_last: draw it now in any case.
        """
        with self._lock:
            self._parts = parts
            passed = time.monotonic() - self._last
            if is_last or passed >= self._interval_s:
                self.redraw()
            elif self._later is None:
                self._later = threading.Timer(self._interval_s - passed, self._draw_late)
                self._later.daemon = True
                self._later.start()

    def clear(self) -> None:
        """Takes the line away: others may be printed, then `redraw` puts it below them."""
        with self._lock:
            self._forget_later()
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0

    def redraw(self) -> None:
        """Draws what `draw` was given last."""
        with self._lock:
            self._forget_later()
            self._last = time.monotonic()
            self._redraw()

    def end(self) -> None:
        """Leaves the line as it should be last, with what comes next below it."""
        with self._lock:
            self.redraw()
            self._write("\n")

    def _draw_late(self) -> None:
        with self._lock:
            if self._later is not None:  # else the line was drawn or taken away meanwhile
                self.redraw()

    def _forget_later(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _redraw(self) -> None:
        width = line_width(self._stream) - 1  # a full line would wrap
        kept = fit(self._parts, width)
        text = "  ".join(part.text for part in kept)[:width]
        blanks = " " * max(0, min(self._drawn, width) - len(text))
        self._drawn = len(text)
        bar = next((part.text for part in kept if part.is_bar), "")
        if bar and bar in text and wants_color(self._stream):
            text = text.replace(bar, click.style(bar, fg="cyan"), 1)
        self._write(f"\r{text}{blanks}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def in_notebook() -> bool:
    """Whether this process was started from a cell: a terminal there moves no cursor."""
    return any(os.environ.get(name) for name in _NOTEBOOKS)


def fit(parts: Sequence[Part], width: int) -> list[Part]:
    """Returns the parts that a line of ``width`` characters has room for, the most needed ones."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(part.text for part in kept)) > width:
        kept.remove(max(kept, key=lambda part: part.need))
    return kept


def bar_text(done: float, total: float, stream: TextIO) -> str:
    """Returns how much is done as a bar, in characters that ``stream`` has."""
    full = round(BAR_WIDTH * min(1.0, done / total)) if total else 0
    is_unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    one, other = ("━", "─") if is_unicode else ("#", ".")
    return one * full + other * (BAR_WIDTH - full)


def line_width(stream: TextIO) -> int:
    """Returns the columns of a terminal as it is now."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(stream.fileno()).columns or NARROW_WIDTH
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return NARROW_WIDTH
