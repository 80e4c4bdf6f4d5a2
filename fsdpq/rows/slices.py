"""``data.split``: the name of a split and a slice of its rows, as ``datasets`` writes them.

``train[:20]``, ``train[10%:20%]``, ``train[-5:]``. Percents are rounded to the nearest row.
https://huggingface.co/docs/datasets/loading#slice-splits
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPLIT = re.compile(r"(?P<name>[^\[]+)(\[(?P<start>(-?\d+%?)?):(?P<stop>(-?\d+%?)?)\])?")


@dataclass(frozen=True)
class RowSlice:
    """A part of a split's rows.

    Attributes:
        name: of the split.
        start: text of the first bound, empty where there is none.
        stop: text of the second.
    """

    name: str
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, split: str) -> RowSlice:
        """Returns what ``data.split`` says; the recipe has checked how it is written."""
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise ValueError(f"`{split}` is no split")
        return cls(match["name"], match["start"] or "", match["stop"] or "")

    @property
    def is_part(self) -> bool:
        """Whether it is less than the whole split."""
        return bool(self.start or self.stop)

    @property
    def needs_total(self) -> bool:
        """Whether it means nothing without the number of rows: percents, rows from the end."""
        return any(bound[:1] == "-" or bound[-1:] == "%" for bound in (self.start, self.stop))

    def bounds(self, total: int | None) -> tuple[int, int | None]:
        """Returns the first row (from 0) and the one after the last, None where that is the end.

        Args:
            total: rows of the whole; may be None where `needs_total` is false.
        """
        start = _bound(self.start, total)
        stop = _bound(self.stop, total)
        return start or 0, stop

    def absolute(self, total: int | None) -> RowSlice:
        """Returns the same slice without percents and rows counted from the end."""
        if not self.needs_total:
            return self
        start, stop = self.bounds(total)
        return RowSlice(self.name, str(start), "" if stop is None else str(stop))

    def __str__(self) -> str:
        """Returns it as ``data.split`` writes it."""
        return f"{self.name}[{self.start}:{self.stop}]" if self.is_part else self.name


def _bound(text: str, total: int | None) -> int | None:
    if not text:
        return None
    value = int(text.rstrip("%"))
    if total is None:
        return value
    if text.endswith("%"):
        value = round(value * total / 100)
    return min(total, value) if value >= 0 else max(0, value + total)
