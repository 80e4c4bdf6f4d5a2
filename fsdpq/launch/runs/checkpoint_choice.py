"""Which checkpoint of a run is meant: a step, the newest, or the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fsdpq.errors import CheckpointError, UsageError
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import (
    SavedCheckpoint,
    check_checkpoint,
    list_checkpoints,
    read_checkpoint,
    step_of,
)

WAYS = ("newest", "best")
"""What may stand for a step."""


def choose_checkpoint(
    files: RunFiles, which: str, *, on_notice: Callable[[str], None]
) -> tuple[Path, SavedCheckpoint]:
    """Returns the directory of a checkpoint whose every byte was read, and its manifest.

    Args:
        files: of the run.
        which: a step, ``newest``, or ``best``: the lowest held-out loss, of the newest if equal.
        on_notice: told of damaged ones that were passed over.

    Raises:
        UsageError: there is none, or ``which`` is nothing like it.
        CheckpointError: the step that was asked for is damaged.
    """
    found = list_checkpoints(files.checkpoints)
    if not found:
        raise UsageError(
            f"the run `{files.root}` has no checkpoints",
            hint="`checkpoint.interval` saves some while a run trains",
        )
    if which not in WAYS:
        return _find_step(found, which)
    candidates: list[tuple[float, Path]] = []
    for directory in found:
        try:
            loss = None if which == "newest" else read_checkpoint(directory).eval_loss
        except CheckpointError as error:
            on_notice(f"passed over: {error.message}")
            continue
        if which == "newest" or loss is not None:
            candidates.append((loss or 0.0, directory))
    for _, directory in sorted(candidates, key=lambda item: item[0]):
        try:
            return directory, check_checkpoint(directory)
        except CheckpointError as error:
            on_notice(f"passed over: {error.message}")
    if which == "best" and not candidates:
        message = f"no checkpoint of the run `{files.root}` has a held-out loss"
        raise UsageError(message, hint="name a step, or `newest`")
    raise CheckpointError(
        f"no checkpoint of the run `{files.root}` is whole", hint="go back to a copy of the run"
    )


def _find_step(found: list[Path], which: str) -> tuple[Path, SavedCheckpoint]:
    steps = [step_of(directory) for directory in found]
    listed = ", ".join(str(step) for step in reversed(steps))
    if not which.isdecimal():
        raise UsageError(
            f"`{which}` is no checkpoint", hint=f"name a step ({listed}), `newest` or `best`"
        )
    if int(which) not in steps:
        raise UsageError(f"there is no checkpoint of step {which}", hint=f"there are {listed}")
    directory = found[steps.index(int(which))]
    return directory, check_checkpoint(directory)
