"""Reads the rows of a source: slice, columns, format, mistakes. Both halves read through here.

The launcher reads every row once (`check_source`), so that a bad one is named before any rank
starts; the worker reads the same rows again (`read_rows`).
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.rows.files.kinds import count_file_rows, read_file
from fsdpq.rows.files.row import FileError, FileRow
from fsdpq.rows.formats import FORMATS, describe_row, find_mistake, named_columns
from fsdpq.rows.mistakes import MAX_COUNTED, BadRow, MistakeLog, file_problem
from fsdpq.rows.slices import RowSlice
from fsdpq.rows.source import RowSource

OnBadRow = Literal["error", "skip"]

MAX_MISTAKE_CHARACTERS = 400
"""A mistake may quote its row."""

FEW_ROWS = 10
"""A file of fewer rows may be mostly bad and its bad rows still be left out."""


class NumberedRow(NamedTuple):
    """A good row.

    Attributes:
        number: its 1-based number among the rows of its file, bad ones counted.
        content: the columns that its format reads, under the format's names.
        file: where it is.
        line: the line where it begins, 0 where the file has no lines to speak of.
    """

    number: int
    content: dict[str, Any]
    file: Path
    line: int


class CheckedRow(NamedTuple):
    """A row, good or bad.

    Attributes:
        file: where it is.
        row: as it was read.
        content: the columns that its format reads, under the format's names; empty if it is bad.
        mistake: what is wrong with it, empty if nothing is.
    """

    file: Path
    row: FileRow
    content: dict[str, Any]
    mistake: str


def read_rows(source: RowSource, *, on_bad_row: OnBadRow = "error") -> Iterator[NumberedRow]:
    """Yields the good rows of ``source`` in order.

    Args:
        source: which rows of which files.
        on_bad_row: ``skip`` leaves out what is not of its format.

    Raises:
        RecipeError: there are bad rows, each sort of mistake with its first place, after the good
            rows before them; or a file that cannot be read; or no rows.
    """
    for file, row, content, _ in _Pass(source, on_bad_row).good_rows():
        yield NumberedRow(row.number, content, file, row.line)


def check_rows(source: RowSource) -> Iterator[CheckedRow]:
    """Yields every row of the slice that ``source`` names, good or bad, whatever ``max_rows`` is.

    Raises:
        RecipeError: a file cannot be read as a whole.
    """
    for file, row in _read_slice(source):
        mistake = row.mistake or find_mistake(row.content, source.format, source.columns)
        content = {} if mistake else named_columns(row.content, source.format, source.columns)
        yield CheckedRow(file, row, content, mistake[:MAX_MISTAKE_CHARACTERS])


def check_source(source: RowSource, *, on_bad_row: OnBadRow = "error") -> tuple[RowSource, str]:
    """Reads every row of ``source``; returns it with its counts, and a line about bad rows.

    The line is empty where no row is bad.

    Raises:
        RecipeError: as `read_rows`; also where most rows of a file are bad, a file is empty, or a
            column that the recipe renames is in no row.
    """
    reading = _Pass(source, on_bad_row)
    num_good = sum(1 for _ in reading.good_rows())
    reading.check_shares()
    log = reading.log
    summary = log.summary(sum(reading.totals.values())) if log.counts else ""
    return replace(source, num_rows=num_good, num_bad_rows=log.num_rows), summary


def first_rows(source: RowSource, count: int) -> dict[str, list[Mapping[str, Any] | None]]:
    """Returns the first rows of every file as they stand there, by its path.

    None stands for a row that cannot be read, so that a row's place in the list is its number.

    Raises:
        RecipeError: a file cannot be read as a whole.
    """
    return {
        str(file.path): [
            None if row.mistake else row.content
            for _, row in itertools.islice(_read_files(replace(source, files=(file,))), count)
        ]
        for file in source.files
    }


def count_rows(source: RowSource) -> int:
    """Returns the rows of all files of ``source``, good or bad, whatever its slice.

    Raises:
        RecipeError: a file cannot be read as a whole.
    """
    total = 0
    for file in source.files:
        try:
            total += count_file_rows(file.path)
        except FileError as error:
            raise RecipeError([file_problem(file.path, error, source.key)]) from error
    return total


def _read_files(source: RowSource) -> Iterator[tuple[Path, FileRow]]:
    for file in source.files:
        try:
            for row in read_file(file.path):
                yield file.path, row
        except FileError as error:
            raise RecipeError([file_problem(file.path, error, source.key)]) from error


def _read_slice(source: RowSource) -> Iterator[tuple[Path, FileRow]]:
    part = RowSlice.parse(source.split)
    start, stop = part.bounds(count_rows(source) if part.needs_total else None)
    stop = sys.maxsize if stop is None else stop
    for index, found in enumerate(_read_files(source)):
        if index >= stop:
            return
        if index >= start:
            yield found


class _Pass:
    """One reading of a source: its good rows, and what is found on the way."""

    def __init__(self, source: RowSource, on_bad_row: OnBadRow) -> None:
        self.log = MistakeLog(source.key, source.format, source.columns)
        self.totals = Counter[Path]()
        self._bad = Counter[Path]()
        self._source = source
        self._skips = on_bad_row == "skip"
        self._unseen = {own for name, own in source.columns.items() if "." not in name}
        self._num_good = 0
        self._is_whole = False

    def good_rows(self) -> Iterator[CheckedRow]:
        """Yields good rows; then raises `RecipeError` if there is something to say."""
        mistakes: list[Problem] = []
        try:
            yield from self._read()
        except RecipeError as error:
            mistakes = error.problems
        if self.log.counts and not self._skips:
            mistakes = [*self.log.problems(), *mistakes]
        if mistakes:
            raise RecipeError(mistakes)
        if self._num_good == 0:
            raise _no_rows(self._source, self.log)

    def _read(self) -> Iterator[CheckedRow]:
        log, most = self.log, self._source.max_rows or sys.maxsize
        for checked in check_rows(self._source):
            log.see(checked.file, checked.row)
            self.totals[checked.file] += 1
            if self._unseen:
                have = checked.row.content
                seen = {own for own in self._unseen if own in have or own.partition(".")[0] in have}
                self._unseen -= seen
            if checked.mistake:
                self._bad[checked.file] += 1
                log.add(BadRow(checked.file, checked.row, checked.mistake))
                if not self._skips and self._is_enough(checked):
                    return
            elif self._skips or not log.counts:
                self._num_good += 1
                yield checked
                if self._num_good == most:
                    return
        self._is_whole = True

    def _is_enough(self, checked: CheckedRow) -> bool:
        """Whether reading on would say nothing new: the format is wrong, or too much is bad."""
        if self._num_good == 0 and self.log.num_rows == 1 and not checked.row.mistake:
            fits = FORMATS[self.log.format].fits(checked.row.content, self.log.columns)
            return not fits
        return self.log.num_rows >= MAX_COUNTED

    def check_shares(self) -> None:
        """Raises where it is the recipe or a whole file that is wrong, not some rows."""
        source, problems = self._source, list[Problem]()
        for file, num_bad in self._bad.items():
            total = self.totals[file]
            if total >= FEW_ROWS and 2 * num_bad > total:
                message = f"{num_bad} of {total} rows of `{file}` are bad: too many to leave out"
                hint = "check `format` and `columns`: the first bad rows are named too"
                problems.append(Problem(message, source.key, Location(str(file)), hint))
        if problems:
            raise RecipeError([*problems, *self.log.problems()])
        if self._is_whole and not RowSlice.parse(source.split).is_part:
            for file in source.files:
                if not self.totals[file.path]:
                    message = f"`{file.path}` has no rows, and other files have"
                    hint = "write it again, or leave it out"
                    problems.append(Problem(message, source.key, Location(str(file.path)), hint))
        for name, own in source.columns.items():
            if own in self._unseen:
                key = f"{source.key}.columns.{name}"
                hint = f"name a column of the rows, or delete `{name}`"
                problems.append(Problem(f"`{key}: {own}`: no row has this column", key, None, hint))
        if problems:
            raise RecipeError(problems)


def _no_rows(source: RowSource, log: MistakeLog) -> RecipeError:
    if log.counts:
        hint = "check `format` and `columns`: the first bad rows are named too"
        problems = [Problem(f"`{source.name}` has no good rows", source.key, None, hint)]
        return RecipeError([*problems, *log.problems()])
    what = f"`{source.files[0].path}`" if len(source.files) == 1 else source.name
    location = Location(str(source.files[0].path)) if len(source.files) == 1 else None
    if RowSlice.parse(source.split).is_part:
        message = f"`{source.split}` of {what} is empty"
        hint = "choose another slice in `split`, or leave it out"
        return RecipeError([Problem(message, f"{source.key}.split", location, hint)])
    hint = describe_row(source.format)
    return RecipeError([Problem(f"{what} has no rows", source.key, location, hint)])
