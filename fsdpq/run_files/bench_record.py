"""What a benchmark found, for its tables, its pictures and ``bench.json``.

The format is documented in ``docs/guides/bench.md``.
A cell of a table is a number, a text, nothing, or a `Spread`: an object with ``median``, ``low``,
``high`` and ``count``.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

FORMAT = 1
"""Version of ``bench.json``."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of the same thing.

    Attributes:
        median: of all.
        low: the smallest.
        high: the largest.
        count: how many.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def scaled(self, factor: float) -> Spread:
        """Returns it in another unit."""
        numbers = (self.median * factor, self.low * factor, self.high * factor)
        return Spread(*numbers, self.count)


Cell: TypeAlias = float | str | Spread | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows' fields.
        heading: above it, with the unit.
        digits: after the point.
    """

    key: str
    heading: str
    digits: int = 0


@dataclass(frozen=True)
class Table:
    """Numbers side by side.

    Attributes:
        title: above the table.
        columns: what is shown, in this order; rows may hold more.
        rows: from keys to cells.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]


@dataclass(frozen=True)
class Ratio:
    """Two measurements of one run, one divided by the other.

    Attributes:
        name: what is divided by what.
        value: the median, of pairs that were measured one right after the other where there are
            several.
        low: the smallest of the pairs.
        high: the largest of the pairs.
        better: ``higher``, ``lower``, or empty where neither is.
        target: what is aimed at, None for nothing.
    """

    name: str
    value: float
    low: float
    high: float
    better: str = ""
    target: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the target is there and was not reached."""
        if self.target is None:
            return False
        return self.value < self.target if self.better == "higher" else self.value > self.target


def ratio(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    *,
    better: str = "",
    target: float | None = None,
) -> Ratio:
    """Returns ``above / below``: in pairs, where as many were measured of both."""
    if len(above) == len(below):
        found = Spread.of([a / b for a, b in zip(above, below, strict=True)])
    else:
        one, other = Spread.of(above), Spread.of(below)
        middle = one.median / other.median
        found = Spread(middle, one.low / other.high, one.high / other.low, 1)
    return Ratio(name, found.median, found.low, found.high, better, target)


@dataclass(frozen=True)
class Plot:
    """What a picture shows.

    Attributes:
        name: of its file, without the ending.
        title: above it.
        x_label: under the axis of lines; empty for bars.
        y_label: with the unit.
        lines: name -> points; lines where it is not empty, else bars.
        bars: groups of bars -> name -> height.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(
        default_factory=dict[str, Sequence[tuple[float, float]]]
    )
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


@dataclass(frozen=True)
class BenchResult:
    """What one benchmark found.

    Attributes:
        tables: the numbers.
        ratios: what is compared, and its targets.
        plots: what is worth a picture.
        notes: what a reader has to know, a sentence each.
    """

    tables: Sequence[Table]
    ratios: Sequence[Ratio] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BenchResult:
        """Returns what `as_json` gave."""
        tables = [
            Table(
                table["title"],
                [Column(**column) for column in table["columns"]],
                [{key: _cell(value) for key, value in row.items()} for row in table["rows"]],
            )
            for table in content["tables"]
        ]
        ratios = [Ratio(**entry) for entry in content["ratios"]]
        plots = [Plot(**entry) for entry in content["plots"]]
        return cls(tables, ratios, plots, content["notes"])


def _cell(value: Any) -> Cell:
    return Spread(**cast("dict[str, Any]", value)) if isinstance(value, dict) else value
