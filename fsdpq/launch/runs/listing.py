"""Finding the runs under a directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import UsageError
from fsdpq.launch.runs.run_dir import RUNS
from fsdpq.launch.slurm.files import JobFiles
from fsdpq.run_files.paths import RunFiles

SWEEPS = Path("sweeps")


def find_runs(folder: Path = RUNS) -> list[RunFiles]:
    """Returns the runs under a directory, by name.

    Args:
        folder: a run; a directory of runs, such as ``runs``; a sweep; or a directory of sweeps.

    Raises:
        UsageError: there is no such directory.
    """
    if not folder.is_dir():
        if folder == RUNS:
            return []
        raise UsageError(f"there is no directory `{folder}`", hint="name one that holds runs")
    return [RunFiles(path) for path in _search(folder)]


def list_run_paths() -> list[Path]:
    """Returns the runs of this directory, in ``runs`` and in ``sweeps``, as they may be typed."""
    return [path for folder in (RUNS, SWEEPS) if folder.is_dir() for path in _search(folder)]


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run, as far as its names tell."""
    return RunFiles(path).resolved.is_file() or JobFiles.of(path).recipe.is_file()


def _search(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if is_run(path):
            yield path
            continue
        inner = path if path.name == RUNS.name else path / RUNS  # of a sweep
        if inner.is_dir():
            yield from (trial for trial in sorted(inner.iterdir()) if is_run(trial))
