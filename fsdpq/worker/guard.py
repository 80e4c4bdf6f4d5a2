"""Keeps a rank accountable: its output in its own log, its error on file, no life as an orphan."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from fsdpq.errors import ExitCode, FsdpqError, Problem, RecipeError
from fsdpq.run_files.rows import RankError
from fsdpq.run_files.writing import write_whole

POLL_S = 1.0


def redirect_output(path: Path) -> None:
    """Sends stdout and stderr of this process, C libraries included, to the end of ``path``."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def take_output() -> TextIO:
    """Returns standard output as it was; whatever is printed from now on goes to standard error."""
    sys.stdout.flush()
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def end_with_launcher() -> None:
    """Ends this process soon after torchrun or the launcher is gone.

    Each may be killed in a way that leaves it no time to stop its children. The launcher's process
    id comes in ``FSDPQ_LAUNCHER_PID``; one that is gone already started torchrun just before.
    """
    watched = [psutil.Process(os.getppid())]
    launcher = os.environ.get("FSDPQ_LAUNCHER_PID", "")
    if launcher.isdigit():
        if not psutil.pid_exists(int(launcher)):
            end_process(ExitCode.RUN_FAILED)
        watched.append(psutil.Process(int(launcher)))

    def watch() -> None:
        while all(process.is_running() for process in watched):
            time.sleep(POLL_S)
        os._exit(ExitCode.RUN_FAILED)

    threading.Thread(target=watch, daemon=True, name="end-with-launcher").start()


@contextlib.contextmanager
def recorded_errors(path: Path, rank: int) -> Iterator[None]:
    """Writes the error that ends this rank to ``path`` as a `RankError`, then exits."""
    try:
        yield
    except FsdpqError as error:
        _record(path, rank, error, "")
        end_process(error.exit_code)
    except Exception as error:
        text = traceback.format_exc()
        _record(path, rank, error, text)
        sys.stderr.write(text)
        end_process(ExitCode.RUN_FAILED)


def end_process(code: int) -> None:
    """Ends the process at once, without tearing down the interpreter.

    After a failure nothing waits for collectives that no peer will complete. After a success it
    keeps gloo's threads from meeting a dying interpreter, which now and then ends a finished rank
    with SIGABRT (https://github.com/pytorch/pytorch/pull/179291, open in torch 2.13).
    """
    with contextlib.suppress(OSError):  # a disk that is full must not change how this ends
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _record(path: Path, rank: int, error: Exception, text: str) -> None:
    record = RankError(
        rank=rank,
        kind=type(error).__name__,
        message=_message(error),
        hint=_hint(error),
        traceback=text,
        exit_code=int(getattr(error, "exit_code", ExitCode.RUN_FAILED)),
        time=time.time(),
        problems=_problems(error),
        details=error.details if isinstance(error, FsdpqError) else "",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(record)).encode())
    except OSError as problem:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{path} cannot be written: {problem}\n{record.message}\n")


def _message(error: Exception) -> str:
    if isinstance(error, RecipeError):
        return "\n".join(_problem_line(problem) for problem in error.problems)
    return error.message if isinstance(error, FsdpqError) else str(error)


def _problems(error: Exception) -> list[dict[str, Any]]:
    found = error.problems if isinstance(error, RecipeError) else []
    return [dataclasses.asdict(problem) for problem in found]


def _hint(error: Exception) -> str:
    if isinstance(error, RecipeError):
        return "; ".join(dict.fromkeys(p.hint for p in error.problems if p.hint))
    return error.hint if isinstance(error, FsdpqError) else ""


def _problem_line(problem: Problem) -> str:
    if problem.location is None:
        return problem.message
    return f"{problem.location.source}:{problem.location.line}: {problem.message}"
