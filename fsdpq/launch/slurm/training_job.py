"""A training run as a job: its directory is made and its recipe frozen when it is submitted.

The job trains ``slurm/recipe.yaml`` of the run directory, so that the user's file may change while
it waits, and goes on from the newest checkpoint whenever it starts again. What depends on the
machine, ``auto`` and the GPUs that Slurm gives, is decided there: nothing of this one counts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import UsageError
from fsdpq.launch.machine.resolve import CPU_RANKS
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.runs.run_dir import check_run_dir, name_run_dir, newest_run_dir, reserve_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.job import Job
from fsdpq.launch.slurm.query import query_jobs
from fsdpq.launch.slurm.script import render_script
from fsdpq.launch.slurm.submit import submit
from fsdpq.recipe.load import LoadedRecipe, dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.launch import SlurmOptions
from fsdpq.registry import check_packages
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

GOES_ON = "checkpoint.resume=auto"
"""What a job adds to its recipe: it may be started again at any time."""


@dataclass(frozen=True)
class Submission:
    """How a run is to become a job.

    Attributes:
        setup: file with lines of shell that come before the training; None takes the user's own
            (`default_setup`), where there is one.
        trust_remote_code: let the ranks run Python code that the model brings.
    """

    setup: Path | None = None
    trust_remote_code: bool = False


def default_setup() -> Path:
    """Returns the file of shell lines that every job of this user gets, where it exists."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "fsdpq" / "slurm-setup.sh"


def show_training_job(
    loaded: LoadedRecipe, submission: Submission, *, run_dir: Path | None = None
) -> str:
    """Returns the script that `submit_training` would submit; makes nothing.

    Raises:
        UsageError: ``run_dir`` is in use, or the setup cannot be read.
    """
    if run_dir is not None and loaded.recipe.checkpoint.resume != "auto":
        check_run_dir(run_dir)
    directory = run_dir or name_run_dir(loaded.recipe)
    return render_script(_training_job(loaded, RunFiles(directory.absolute()), submission))


def submit_training(
    loaded: LoadedRecipe, submission: Submission, *, screen: Screen, run_dir: Path | None = None
) -> tuple[RunFiles, int]:
    """Makes a run directory, freezes the recipe in it, and submits the job that trains it.

    Args:
        loaded: the recipe.
        submission: how.
        screen: shows what happens.
        run_dir: a new directory; None takes one in ``runs/``. With ``checkpoint.resume: auto``
            it may hold a run that is to go on.

    Returns:
        The run directory, and the number of the job.

    Raises:
        UsageError: the run directory is in use.
        MissingDependencyError: a package that the recipe needs is missing.
        EnvironmentProblemError: there is no Slurm here, or it refuses the job.
    """
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    check_packages(loaded.recipe)
    found = _run_to_go_on(loaded.recipe, run_dir)
    files = found or reserve_run_dir(loaded.recipe, run_dir)
    job = _training_job(loaded, RunFiles(files.root.absolute()), submission)
    try:
        job.folder.mkdir(exist_ok=True)
        write_whole(job.files.recipe, _frozen(loaded).encode())
        number = submit(job)
    except BaseException:
        if found is None:
            shutil.rmtree(files.root, ignore_errors=True)
        raise
    return files, number


def check_no_job(files: RunFiles) -> None:
    """Checks that no job of a run waits or runs: two of them would write the same run.

    Raises:
        UsageError: one does.
        EnvironmentProblemError: Slurm gives no answer.
    """
    record = read_record(JobFiles.of(files.root))
    if record is None:
        return
    alive = [each for each in query_jobs([record.id]) if each.phase in ("queued", "running")]
    if alive:
        hint = f"wait for it, or end it: `fsdpq cancel {shlex.quote(str(files.root))}`"
        raise UsageError(f"`{files.root}` has a job already: {alive[0].text}", hint=hint)


def ranks_per_node(recipe: Recipe) -> int:
    """Returns the ranks of a job on each of its machines."""
    launch = recipe.launch
    if launch.nproc_per_node != "auto":
        return launch.nproc_per_node
    return CPU_RANKS if launch.device == "cpu" else launch.slurm.gpus_per_node or 1


def read_setup(path: Path | None) -> str:
    """Returns the lines of shell that a job of this user starts with; may be empty.

    Args:
        path: as the user named it; None is `default_setup`, where there is one.

    Raises:
        UsageError: it cannot be read.
    """
    chosen = default_setup() if path is None else path
    if path is None and not chosen.is_file():
        return ""
    try:
        return chosen.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        hint = "name a file of shell lines, such as `module load cuda`"
        raise UsageError(f"`{chosen}` cannot be read: {reason}", hint=hint) from None


def _training_job(loaded: LoadedRecipe, files: RunFiles, submission: Submission) -> Job:
    recipe, own = loaded.recipe, JobFiles.of(files.root)
    command: Sequence[str] = (
        sys.executable, "-m", "fsdpq", "train", str(own.recipe),
        "--base-dir", str(loaded.base_dir.absolute()), "--run-dir", str(files.root),
        *([TRUST_FLAG] if submission.trust_remote_code else []), GOES_ON,
    )  # fmt: skip
    return Job(
        name=recipe.name,
        command=tuple(command),
        options=recipe.launch.slurm,
        num_nodes=recipe.launch.nnodes,
        ranks_per_node=ranks_per_node(recipe),
        device=recipe.launch.device if recipe.launch.device == "cpu" else "cuda",
        folder=own.folder,
        work_dir=Path.cwd(),
        setup=read_setup(submission.setup),
    )


def _frozen(loaded: LoadedRecipe) -> str:
    """Returns the recipe as the job trains it: on the machines that it is given, without Slurm."""
    recipe = loaded.recipe
    here = {"scheduler": "local", "slurm": SlurmOptions.model_construct()}
    launch = recipe.launch.model_copy(update=here)
    given = shlex.join([str(loaded.path), *loaded.overrides]).replace("\n", " ")
    head = f"# What the job trains. Frozen when it was submitted from: {given}\n"
    return head + dump_recipe(recipe.model_copy(update={"launch": launch}))


def _run_to_go_on(recipe: Recipe, run_dir: Path | None) -> RunFiles | None:
    """Returns the run that a recipe with ``checkpoint.resume: auto`` goes on with, if any."""
    if recipe.checkpoint.resume != "auto":
        return None
    directory = run_dir or newest_run_dir(recipe)
    if directory is None or not JobFiles.of(directory).folder.is_dir():
        return None
    check_no_job(RunFiles(directory))
    return RunFiles(directory)
