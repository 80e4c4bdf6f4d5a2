"""From how a trial's ``fsdpq train`` ended to what became of the trial."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

from fsdpq.errors import ExitCode
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.sweep.outcome import Outcome, Status

_STOPPED = (ExitCode.SAVED, ExitCode.INTERRUPTED)
_STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})
_MAX_REASON = 300
_ERROR, _BUG = "error: ", "this is a bug in fsdpq"


def settle(
    outcome: Outcome, exit_code: int, *, files: RunFiles, log: Path, log_start: int, asked: bool
) -> Outcome:
    """Returns what became of a trial whose ``fsdpq train`` has ended.

    Args:
        outcome: as it was while the trial ran.
        exit_code: negative for a signal.
        files: the trial's run directory.
        log: what its ``fsdpq train`` printed.
        log_start: bytes in it that an earlier start printed.
        asked: whether it was asked to end.
    """
    status = _status(exit_code, files, asked=asked)
    reason = ""
    if status in ("failed", "skipped"):
        said = _read_error(log, log_start) if exit_code > 0 else ""
        reason = said or _describe(exit_code)
    return replace(outcome, status=status, reason=reason, exit_code=exit_code, ended=time.time())


def _status(exit_code: int, files: RunFiles, *, asked: bool) -> Status:
    if exit_code == ExitCode.OK:
        return "finished"
    if asked or exit_code in _STOPPED or -exit_code in _STOP_SIGNALS:
        return "interrupted"
    if exit_code == ExitCode.DOES_NOT_FIT and not _has_started(files):
        return "skipped"
    return "failed"


def _has_started(files: RunFiles) -> bool:
    """Whether a rank of it ever began: what did not fit then is a failure, and no plan."""
    return next(read_json_lines(files.events), None) is not None


def _read_error(log: Path, start: int) -> str:
    """Returns the first error that ``fsdpq train`` printed, else its last words, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith(_ERROR)]
    words = [line.strip() for line in lines if line.strip() and not line.startswith(_BUG)]
    said = errors[0].removeprefix(_ERROR) if errors else "".join(words[-1:])
    return said if len(said) <= _MAX_REASON else said[: _MAX_REASON - 3] + "..."


def _describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"`fsdpq train` ended with exit code {exit_code}"
    try:
        return f"`fsdpq train` was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"`fsdpq train` was ended by signal {-exit_code}"
