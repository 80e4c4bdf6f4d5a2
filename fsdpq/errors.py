"""The exceptions of fsdpq, the located mistake (`Problem`) and the exit codes.

    FsdpqError                      exit  what the user did not get
    |-- RecipeError(problems)        2    a recipe that can run
    |-- UsageError                   2    a command line that makes sense
    |-- PlanError                    3    a run that fits in memory
    |-- MissingDependencyError       4    a package that the recipe needs
    |-- EnvironmentProblemError      4    a GPU, disk space, a port
    |   `-- FetchError               4    a download that is whole and right
    |-- LaunchError                  1    ranks that start and stay alive
    |-- RunStoppedError            130    a run that nobody stopped
    |   `-- RunSavedError           75    the same, but for what a checkpoint keeps
    |-- TrainingError                1    a loss that stays finite
    |-- CheckpointError              1    a checkpoint or base that can be read
    |   `-- DamagedBaseError         1    a quantized base that is what was written
    |-- DamagedDataError             1    prepared data that is what was written
    `-- ExportError                  1    an adapter that loads elsewhere

Every message names what happened, where, and one action that the user can take (`hint`). Both
halves import this module, so it imports nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the shell."""

    OK = 0
    RUN_FAILED = 1
    RECIPE = 2
    DOES_NOT_FIT = 3
    ENVIRONMENT = 4
    SAVED = 75
    """The run was stopped and saved: ``fsdpq resume`` goes on. sysexits.h calls it EX_TEMPFAIL."""
    INTERRUPTED = 130


@dataclass(frozen=True)
class Location:
    """A place in a recipe file, or the command line.

    Attributes:
        source: path of the file as the user gave it, or ``command line``.
        line: 1-based line, 0 where there is none (command line, whole file).
        column: 1-based column of the first character, 0 where there is none.
        text: the whole line, for the excerpt.
        length: number of characters to underline.
    """

    source: str
    line: int = 0
    column: int = 0
    text: str = ""
    length: int = 1


@dataclass(frozen=True)
class Problem:
    """One located mistake in a recipe.

    Attributes:
        message: what is wrong; literals in backticks, no trailing period.
        key: dotted recipe key (``adapter.rank``), empty for the whole document.
        location: where the value was written, None where it was written nowhere (a default).
        hint: one action that the user can take.
    """

    message: str
    key: str = ""
    location: Location | None = None
    hint: str = ""

    @property
    def sort_key(self) -> tuple[str, float, int]:
        """Orders problems by file, line and column; those of a whole file come after its lines."""
        if self.location is None:
            return ("\uffff", 0, 0)
        return (self.location.source, self.location.line or math.inf, self.location.column)


@dataclass
class FsdpqError(Exception):
    """Anything that fsdpq itself reports: one message, one hint, one exit code."""

    message: str
    hint: str = ""
    details: str = field(default="", repr=False)

    exit_code = ExitCode.RUN_FAILED

    def __str__(self) -> str:
        """Returns the message, and the hint on a line of its own."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RecipeError(FsdpqError):
    """A recipe that cannot run; carries every `Problem` at once."""

    exit_code = ExitCode.RECIPE

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.sort_key)
        count = len(self.problems)
        super().__init__(f"{count} problem{'' if count == 1 else 's'} in the recipe")


class UsageError(FsdpqError):
    """A command line that asks for something that cannot be done."""

    exit_code = ExitCode.RECIPE


class PlanError(FsdpqError):
    """A run that does not fit in memory."""

    exit_code = ExitCode.DOES_NOT_FIT


class MissingDependencyError(FsdpqError):
    """A package that the recipe needs is not installed."""

    exit_code = ExitCode.ENVIRONMENT


class EnvironmentProblemError(FsdpqError):
    """The machine lacks something: a GPU, disk space, a free port."""

    exit_code = ExitCode.ENVIRONMENT


class FetchError(EnvironmentProblemError):
    """A download failed, is incomplete, or is not what it should be."""


class LaunchError(FsdpqError):
    """The ranks could not be started, or one of them died."""


class RunStoppedError(FsdpqError):
    """A run that was stopped from outside, by Ctrl-C or SIGTERM."""

    exit_code = ExitCode.INTERRUPTED


class RunSavedError(RunStoppedError):
    """A run that was stopped from outside after it had saved a checkpoint to go on from."""

    exit_code = ExitCode.SAVED


class TrainingError(FsdpqError):
    """Training itself went wrong, for example a loss that is not finite."""


class CheckpointError(FsdpqError):
    """A checkpoint or a base model cannot be read: missing, truncated, mis-shaped."""


class DamagedBaseError(CheckpointError):
    """A quantized base is not what its writer wrote; made again, it is whole."""


class DamagedDataError(FsdpqError):
    """Prepared data is not what its writer wrote; made again, it is whole."""


class ExportError(FsdpqError):
    """An adapter could not be written, or does not load elsewhere."""
