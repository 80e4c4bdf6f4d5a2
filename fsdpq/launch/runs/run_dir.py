"""Making the run directory: named after what runs, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.recipe.continuation import hash_run
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

RUNS = Path("runs")
JOB_FOLDER = "slurm"
"""Name of a job's folder inside the directory that it works for; it is there before the run is."""

MIN_FREE_BYTES = 500 * 10**6


def create_run_dir(
    recipe: Recipe, *, raw: bytes, lock: dict[str, Any], run_dir: Path | None = None
) -> RunFiles:
    """Creates the directory of one run and writes the recipe, as given and resolved, and its lock.

    Args:
        recipe: the resolved recipe.
        raw: the recipe as the user gave it.
        lock: the content of ``run.lock.json``.
        run_dir: where; None takes a new directory ``runs/<name>-<hash of
            what makes the run>``.

    Raises:
        UsageError: ``run_dir`` holds something already.
        EnvironmentProblemError: it cannot be written, or the disk is nearly full.
    """
    resolved = dump_recipe(recipe)
    files = reserve_run_dir(recipe, run_dir)
    with explain_disk_errors(run_dir or RUNS):
        try:
            files.logs.mkdir()
            write_whole(files.recipe, raw)
            write_whole(files.resolved, resolved.encode())
            write_whole(files.lock, (json.dumps(lock, indent=2) + "\n").encode())
        except BaseException:
            empty_run_dir(files)
            if not any(files.root.iterdir()):
                files.root.rmdir()
            raise
    return files


def reserve_run_dir(recipe: Recipe, run_dir: Path | None = None) -> RunFiles:
    """Creates the directory of one run, with nothing in it.

    Args:
        recipe: gives the name of the directory.
        run_dir: where; None takes a new directory in ``runs/``.

    Raises:
        UsageError: ``run_dir`` holds something already.
        EnvironmentProblemError: it cannot be made, or the disk is nearly full.
    """
    if run_dir is not None:
        check_run_dir(run_dir)
    parent = run_dir.absolute().parent if run_dir is not None else RUNS.absolute()
    with explain_disk_errors(run_dir or RUNS):
        parent.mkdir(parents=True, exist_ok=True)
        _check_free_space(parent)
        return RunFiles(_make_directory(recipe, run_dir))


def empty_run_dir(files: RunFiles) -> None:
    """Removes what a run directory holds, but for the folder of a job that works for it."""
    for path in list(files.root.iterdir()):
        if path.name == JOB_FOLDER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_run_dir(run_dir: Path) -> None:
    """Checks that a run may be written to ``run_dir``: it is new, or an empty directory.

    The folder of the job that makes the run may be in it.

    Raises:
        UsageError: it is not.
    """
    if run_dir.is_dir() and any(path.name != JOB_FOLDER for path in run_dir.iterdir()):
        message = f"the run directory `{run_dir}` exists and is not empty"
        raise UsageError(message, hint="name another one, or leave `--run-dir` out for a new one")
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"`{run_dir}` is a file", hint="name a directory with `--run-dir`")


def newest_run_dir(recipe: Recipe) -> Path | None:
    """Returns the newest directory that a recipe has in ``runs/``, None where it has none.

    Args:
        recipe: resolved.
    """
    stem, number, newest = _stem(recipe), 1, None
    while (path := RUNS / _numbered(stem, number)).is_dir():
        newest, number = path, number + 1
    return newest


def name_run_dir(recipe: Recipe) -> Path:
    """Returns the directory that the next run of ``recipe`` gets in ``runs/``; does not make it."""
    number = 1
    while (path := RUNS / _numbered(_stem(recipe), number)).exists():
        number += 1
    return path


def _stem(recipe: Recipe) -> str:
    """Settings that a run may change when it goes on do not change the name of its directory."""
    return f"{recipe.name}-{hash_run(recipe)[:8]}"


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def _make_directory(recipe: Recipe, run_dir: Path | None) -> Path:
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
        return run_dir
    number = 1
    while True:
        path = RUNS / _numbered(_stem(recipe), number)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _check_free_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < MIN_FREE_BYTES:
        message = f"the disk of `{directory}` has {free / 1e6:.0f} MB left"
        hint = f"a run needs {MIN_FREE_BYTES / 1e6:.0f} MB: free some, or use `--run-dir`"
        raise EnvironmentProblemError(message, hint=hint)


@contextmanager
def explain_disk_errors(path: Path) -> Generator[None, None, None]:
    """Turns errors of the disk within the block into one for the user.

    Args:
        path: what is being written.

    Raises:
        EnvironmentProblemError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        message = f"the run directory cannot be written under `{path}`: {error.strerror or error}"
        hint = "choose a place that you can write to: `--run-dir DIR`"
        raise EnvironmentProblemError(message, hint=hint) from None
