"""A training run as a job: its directory is made and its recipe frozen when it is submitted.

The job trains ``slurm/recipe.yaml`` of the run directory, so that the user's file may change while
it waits, and goes on from the newest checkpoint whenever it starts again. What depends on the
machine, ``auto`` and the GPUs that Slurm gives, is decided there: nothing of this one counts.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.machine.resolve import CPU_RANKS
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.runs.lock_file import as_list
from fsdpq.launch.runs.recorded import open_recorded
from fsdpq.launch.runs.run_dir import (
    check_run_dir,
    explain_disk_errors,
    name_run_dir,
    newest_run_dir,
    reserve_run_dir,
)
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
        with explain_disk_errors(files.root):
            job.folder.mkdir(exist_ok=True)
            write_whole(job.files.recipe, _frozen(loaded).encode())
            number = submit(job)
    except BaseException:
        if found is None:
            shutil.rmtree(files.root, ignore_errors=True)
        raise
    return files, number


def show_resume_job(
    run_dir: Path, overrides: Sequence[str], submission: Submission, *, force: bool = False
) -> str:
    """Returns the script that `submit_resume` would submit; makes nothing.

    Raises:
        UsageError: there is no such run.
        RecipeError: an override is wrong, or does not fit the recipe.
    """
    return render_script(_resume_job(run_dir, overrides, submission, force=force))


def submit_resume(
    run_dir: Path, overrides: Sequence[str], submission: Submission, *, force: bool = False
) -> int:
    """Submits a job that goes on with a run; returns its number.

    Args:
        run_dir: of a run that did not come to its end.
        overrides: of its recipe; ``launch.slurm`` is that of the run's last job where they say
            nothing.
        submission: how.
        force: go on although settings, rows or the base are others than before.

    Raises:
        UsageError: there is no such run, or it has a job already.
        RecipeError: an override is wrong, or does not fit the recipe.
        EnvironmentProblemError: there is no Slurm here, or it refuses the job.
    """
    job = _resume_job(run_dir, overrides, submission, force=force)
    check_no_job(RunFiles(run_dir))
    with explain_disk_errors(run_dir):
        return submit(job)


def check_no_job(files: RunFiles) -> None:
    """Checks that no job of a run waits or runs: two launchers would write the same run.

    The job that asks does not count, and where Slurm gives no answer none does.

    Raises:
        UsageError: one does.
    """
    record = read_record(JobFiles.of(files.root))
    if record is None or os.environ.get("SLURM_JOB_ID") == str(record.id):
        return
    try:
        alive = [each for each in query_jobs([record.id]) if each.phase in ("queued", "running")]
    except EnvironmentProblemError:
        return
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
    command = (
        sys.executable, "-m", "fsdpq", "train", str(own.recipe),
        "--base-dir", str(loaded.base_dir.absolute()), "--run-dir", str(files.root),
        *([TRUST_FLAG] if submission.trust_remote_code else []), GOES_ON,
    )  # fmt: skip
    return _job_of(recipe, own.folder, command, submission)


def _job_of(recipe: Recipe, folder: Path, command: tuple[str, ...], submission: Submission) -> Job:
    return Job(
        name=recipe.name,
        command=command,
        options=recipe.launch.slurm,
        num_nodes=recipe.launch.max_nodes,
        least_nodes=recipe.launch.min_nodes,
        ranks_per_node=ranks_per_node(recipe),
        device=recipe.launch.device if recipe.launch.device == "cpu" else "cuda",
        folder=folder,
        work_dir=Path.cwd(),
        setup=read_setup(submission.setup),
    )


def _resume_job(
    run_dir: Path, overrides: Sequence[str], submission: Submission, *, force: bool
) -> Job:
    own = JobFiles.of(run_dir.absolute())
    recorded = open_recorded(run_dir, trust_remote_code=submission.trust_remote_code)
    told = {text.lstrip("+~").partition("=")[0] for text in overrides}
    before = read_record(own)
    kept = before.options if before is not None else {}
    asked = [f"launch.slurm.{name}={json.dumps(value)}" for name, value in kept.items()]
    asked = [text for text in asked if text.partition("=")[0] not in told]
    again = [f"{key}=auto" for key in as_list(recorded.lock.get("auto")) if key not in told]
    fresh = [*again, "launch.rdzv_endpoint=null", *asked]
    recipe = recorded.load([*fresh, "launch.scheduler=slurm", *overrides]).recipe
    elsewhere = ("launch.scheduler", "launch.slurm")
    passed = [text for text in overrides if not text.lstrip("+~").startswith(elsewhere)]
    command = (
        sys.executable, "-m", "fsdpq", "resume", str(run_dir.absolute()), *passed,
        *(["--force"] if force else []),
        *([TRUST_FLAG] if submission.trust_remote_code else []),
    )  # fmt: skip
    return _job_of(recipe, own.folder, command, submission)


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
