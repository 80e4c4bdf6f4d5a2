"""A run that is there to be used: its paths, its lock, its base, the device to use it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.recipe.load import load_resolved
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints

NAME_A_RUN = "name a directory that `fsdpq train` made, such as `runs/quickstart-1a2b3c4d`"


def check_is_run(files: RunFiles, *, hint: str = NAME_A_RUN) -> None:
    """Checks that ``files`` are those of a run.

    Args:
        files: of the run.
        hint: what to name instead.

    Raises:
        UsageError: they are not.
    """
    if not files.resolved.is_file() or not files.lock.is_file():
        raise UsageError(f"`{files.root}` is no run directory", hint=hint)


def read_lock(files: RunFiles) -> dict[str, Any]:
    """Returns the lock of a run whose base model is still where the lock says.

    Raises:
        UsageError: it is not.
    """
    lock: dict[str, Any] = json.loads(files.lock.read_text(encoding="utf-8"))
    base = Path(lock["inputs"]["model"]["directory"])
    if not base.is_dir():
        message = f"the base model of the run `{files.root}` is gone: there is no `{base}`"
        raise UsageError(message, hint="bring it back there; a new `fsdpq train` fetches it again")
    return lock


def open_run(run_dir: Path, *, needs_export: bool = True) -> RunFiles:
    """Returns the paths of a run that has something to answer with.

    Args:
        run_dir: of the run.
        needs_export: False takes one that has not finished.

    Raises:
        UsageError: it is none, has not finished, or its base model is gone.
    """
    files = RunFiles(run_dir)
    check_is_run(files)
    exported = any(path.is_dir() for path in (files.adapter, files.model, files.delta))
    if needs_export and not exported:
        message = f"the run `{run_dir}` has exported nothing: it did not finish"
        hint = "train it to the end with `fsdpq resume`; `logs/` tells why it ended"
        if list_checkpoints(files.checkpoints):
            hint = "`--checkpoint newest` answers with what it saved last"
        raise UsageError(message, hint=hint)
    read_lock(files)
    return files


def choose_device(files: RunFiles, device: str) -> str:
    """Returns ``cuda`` or ``cpu``.

    Raises:
        UsageError: ``cuda`` is asked for, and there is no GPU.
    """
    if device == "cpu":
        return device
    has_gpu = bool(list_gpus())
    if device == "cuda" and not has_gpu:
        raise UsageError("there is no GPU for `--device cuda`", hint="`fsdpq doctor` tells more")
    wanted = device == "cuda" or load_resolved(files.resolved).launch.device == "cuda"
    return "cuda" if wanted and has_gpu else "cpu"
