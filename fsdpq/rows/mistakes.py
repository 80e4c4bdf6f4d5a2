"""Bad rows of a source: counted by what is wrong with them, and said with their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fsdpq.errors import Location, Problem
from fsdpq.recipe.describe import suggest
from fsdpq.rows.files.row import FileError, FileRow
from fsdpq.rows.formats import FORMATS, describe_row

MAX_PROBLEMS = 20
"""Bad rows that are reported."""

MAX_COUNTED = 10_000
"""Bad rows after which reading for more of them stops."""

MAX_SORTS = 1000
"""Mistakes that are told apart, so that memory stays bounded."""

_OTHER = "other mistakes"
_EXCERPT_CHARACTERS = 160


@dataclass(frozen=True)
class BadRow:
    """A row that is not of its format.

    Attributes:
        file: where it is.
        row: as it was read.
        mistake: what is wrong with it.
    """

    file: Path
    row: FileRow
    mistake: str

    @property
    def place(self) -> str:
        """Where it is, for people: ``line 3 of rows.jsonl``."""
        return place_of(self.file, self.row)


@dataclass
class MistakeLog:
    """The bad rows of a source.

    Attributes:
        key: recipe key of the source.
        format: of the source.
        columns: those that the recipe renames, the format's name -> the files' own.
        shown: the first row of each mistake that was made more than once, and all others.
        counts: mistake -> rows with it.
        first: the first row of the source, bad or not, where it could be read.
    """

    key: str
    format: str
    columns: Mapping[str, str]
    shown: list[BadRow] = field(default_factory=list[BadRow])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    first: tuple[Path, FileRow] | None = None

    @property
    def num_rows(self) -> int:
        """Bad rows so far."""
        return sum(self.counts.values())

    def see(self, file: Path, row: FileRow) -> None:
        """Remembers the first row, to compare the columns of bad ones with it."""
        if self.first is None and not row.mistake:
            self.first = (file, _names_only(row))

    def add(self, bad: BadRow) -> None:
        """Counts a bad row."""
        known = self.counts.get(bad.mistake, 0)
        sort = bad.mistake if known or len(self.counts) < MAX_SORTS else _OTHER
        self.counts[sort] = self.counts.get(sort, 0) + 1
        if not known and len(self.shown) < MAX_PROBLEMS:
            self.shown.append(replace(bad, row=_names_only(bad.row)))

    def problems(self) -> list[Problem]:
        """Returns a Problem for every sort of mistake, at the first row that has it."""
        return [self._problem(bad) for bad in self.shown]

    def summary(self, total: int) -> str:
        """Returns one line that says how many rows are left out and why."""
        first = self.shown[0]
        more = self.num_rows - 1
        text = f"{self.num_rows} of {total} rows are bad and left out: {first.place}: "
        text += first.mistake
        return f"{text}, and {more} more" if more else text

    def _problem(self, bad: BadRow) -> Problem:
        row, message = bad.row, bad.mistake
        if not row.text:
            message = f"row {row.number}: {message}"
        if (more := self.counts[bad.mistake] - 1) > 0:
            message += f" ({more} more row{'s' if more > 1 else ''} like it)"
        location = Location(str(bad.file), row.line, min(row.line, 1), row.text)
        return Problem(message, self.key, location, self._hint(bad))

    def _hint(self, bad: BadRow) -> str:
        row = bad.row
        if row.mistake:
            return "correct it, or leave bad rows out: `data.on_bad_row: skip`"
        if self._lacks_columns(row):
            if self.first and not self._lacks_columns(self.first[1]):
                listed = ", ".join(f"`{name}`" for name in self.first[1].content)
                rest = "make them alike, or give each sort a part of `data.mixture`"
                return f"rows differ: {place_of(*self.first)} has {listed}; {rest}"
            if guess := guess_columns(row.content, self.format, self.columns):
                wanted = ", ".join(f"{name}: {own}" for name, own in guess.items())
                return f"if it is another name, write `columns: {{{wanted}}}`"
        return describe_row(self.format, row.content, self.columns)

    def _lacks_columns(self, row: FileRow) -> bool:
        return not FORMATS[self.format].fits(row.content, self.columns)


def _names_only(row: FileRow) -> FileRow:
    """Returns what messages say of a row: it may be large."""
    return row._replace(content=dict.fromkeys(row.content), text=row.text[:_EXCERPT_CHARACTERS])


def guess_columns(
    row_columns: Iterable[str], format_name: str, columns: Mapping[str, str]
) -> dict[str, str]:
    """Returns the ``columns`` that would name each missing column, none where one stays missing."""
    have = list(row_columns)
    known = FORMATS[format_name]
    under = {known.aliases.get(name, name) for name in have} | set(columns)
    guesses: dict[str, str] = {}
    for name in known.columns:
        if name not in under:
            guess = suggest(name, [own for own in have if own not in guesses.values()])
            if guess is None:
                return {}
            guesses[name] = guess
    return {**columns, **guesses} if guesses else {}


def file_problem(path: Path, error: FileError, key: str) -> Problem:
    """Returns the Problem for a file that cannot be read as a whole."""
    location = Location(str(path), error.line, min(error.line, 1))
    return Problem(f"`{path}` {error.message}", key, location, error.hint)


def place_of(file: Path, row: FileRow) -> str:
    """Returns where a row is, for people: ``line 3 of rows.jsonl``."""
    return f"line {row.line} of {file.name}" if row.line else f"row {row.number} of {file.name}"
