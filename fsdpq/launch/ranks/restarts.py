"""Starting the ranks again: when it makes sense, and what must be cleared away before.

The launcher restarts, with a new torchrun, and not torchrun itself by its ``--max-restarts``
(torch 2.13): torchrun starts its workers again whatever ended them, also where the same mistake
would end them again or where the launcher is gone, and it is no help where it is killed itself or
where ranks hang.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fsdpq.errors import CheckpointError, ExitCode, FsdpqError, RecipeError, RunStoppedError
from fsdpq.launch.ranks.keeper import resume_hint
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RankError
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, read_checkpoint

FINAL_CODES = frozenset(
    {ExitCode.RECIPE, ExitCode.DOES_NOT_FIT, ExitCode.ENVIRONMENT, ExitCode.SAVED}
)
"""Exit codes of failures that the same start would meet again."""


def may_pass(error: FsdpqError, records: Iterable[RankError]) -> bool:
    """Whether what ended the ranks may not happen again.

    A rank that was killed, that hung, or that died of something nobody foresaw (it left a
    traceback) may do better. What fsdpq itself reports, such as a loss that is not finite or a
    package that is missing, it would report again.

    Args:
        error: what `fsdpq.launch.ranks.failure` made of it.
        records: the errors that ranks wrote.
    """
    if isinstance(error, RecipeError | RunStoppedError) or error.exit_code in FINAL_CODES:
        return False
    return all(record.traceback for record in records)


def clear_for_start(files: RunFiles) -> None:
    """Puts away what an earlier start of the ranks left, so that it is not taken for the new one's.

    Errors and torchrun's log go to ``logs/attempt-N``; so do the rows where there is no checkpoint:
    the ranks start at the first step. Half a line at the end of the rows, left by a power cut or a
    full disk, is cut off: the next row would be written onto it.
    """
    left = [*sorted(files.logs.glob("rank-*.error.json")), files.torchrun_log]
    left += sorted(files.logs.glob("node-*.torchrun.log"))
    if not list_checkpoints(files.checkpoints):
        left += [files.metrics, files.events]
    left = [path for path in left if path.exists()]
    if left:
        number = 1
        while files.attempt(number).exists():
            number += 1
        files.attempt(number).mkdir()
        for path in left:
            path.replace(files.attempt(number) / path.name)
    for rows in (files.metrics, files.events):
        cut_half_line(rows)


def cut_half_line(path: Path) -> None:
    """Cuts off the end of a file of JSON lines that is no whole row."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    num_bytes = sum(len(line) for line in lines)
    while lines and not _is_row(lines[-1]):
        num_bytes -= len(lines.pop())
    if num_bytes != path.stat().st_size:
        os.truncate(path, num_bytes)


def newest_step(files: RunFiles) -> int | None:
    """Returns the step of the newest checkpoint whose manifest can be read, None without one."""
    for directory in list_checkpoints(files.checkpoints):
        try:
            return read_checkpoint(directory).step
        except CheckpointError:
            continue
    return None


def restart_text(files: RunFiles, error: FsdpqError, *, number: int, limit: int) -> str:
    """Returns what is said before the ranks start again: why, and where they go on."""
    what = error.message.splitlines()[0]
    if "was killed" in what:
        what = what.partition(":")[0]  # the rest guesses at the reason, for a run that ends of it
    step = newest_step(files)
    where = "from the first step" if step is None else f"going on from step {step}"
    return f"{what}: restart {number} of {limit}, {where}"


def name_way_back(files: RunFiles, error: FsdpqError) -> None:
    """Adds to the hint of ``error`` how to go on, where there is a checkpoint to go on from."""
    way = resume_hint(files)
    if not way or isinstance(error, RecipeError | RunStoppedError):
        return  # the one for a run that was stopped says it already
    if way not in error.hint:
        error.hint = f"{error.hint}; {way}" if error.hint else way


def _is_row(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
