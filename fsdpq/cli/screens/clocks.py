"""How fast a run goes, by the times that rank 0 wrote: the same whether one watches or reads it."""

from __future__ import annotations

import math

from fsdpq.cli.run_texts import format_seconds
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.amounts import format_bytes


class LineClock:
    """Says when a line of a kind is due again, so that a pipe gets few.

    Args:
        interval_s: seconds between two lines.
        shows_first: whether the first is due; else the seconds count from there.
    """

    def __init__(self, interval_s: float, *, shows_first: bool) -> None:
        self._interval_s = interval_s
        self._last: float | None = -math.inf if shows_first else None

    def is_due(self, row: Row, *, always: bool = False) -> bool:
        """Takes the next row; returns whether to show it.

        Args:
            row: with its time.
            always: it is due whatever the time.
        """
        now = float(row.get("time", 0.0))
        if self._last is None:
            self._last = now
        if always or abs(now - self._last) >= self._interval_s:
            self._last = now
            return True
        return False


class StepClock:
    """Measures steps by the times that rank 0 wrote."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def take(self, row: Row) -> None:
        """Takes one row of a step."""
        self._last = (row["step"], row["time"])
        self._first = self._first or self._last

    def eta(self, row: Row) -> str:
        """Returns the time that the remaining steps take at the mean speed so far."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return "--:--"
        pace = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return format_seconds(pace * (row["total_steps"] - row["step"]))


class LoadClock:
    """Measures loading by the times that rank 0 wrote; the first row is the beginning."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._done = self._total = 0
        self._time = 0.0

    def take(self, row: Row) -> None:
        """Takes one row of ``load``."""
        if row["done_bytes"] < self._done:
            self._first = None  # quantizing is over, loading begins
        self._done, self._total = row["done_bytes"], row["total_bytes"]
        self._time = row.get("time", 0.0)
        self._first = self._first or (self._done, self._time)

    def text(self) -> str:
        """Returns how much is done of how much, at what speed, and the time that is left."""
        return "  ".join(self.parts())

    def parts(self) -> list[str]:
        """Returns the same as one text or three: without a speed there is no time left."""
        amount = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
        first_done, first_time = self._first or (0, 0.0)
        passed = self._time - first_time
        if passed <= 0 or self._done <= first_done:
            return [amount]
        speed = (self._done - first_done) / passed
        left = format_seconds((self._total - self._done) / speed)
        return [amount, f"{format_bytes(speed)}/s", f"eta {left}"]
