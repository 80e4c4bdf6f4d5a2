"""A sweep as an array of Slurm's: a task is a trial, and runs it as a runner here would.

The array's folder is ``slurm/`` of the sweep directory; ``array.json`` in it says which trial each
task has. Tasks write the outcomes themselves, so nothing has to run meanwhile: ``fsdpq sweep DIR``
collects what is there, and submits the rest again once the array is over.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import ExitCode, Problem, RecipeError, UsageError
from fsdpq.fetch.holds import hold
from fsdpq.launch.ranks.processes import TRUST_FLAG, catch_stop_signals
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.job import Job
from fsdpq.launch.slurm.query import query_jobs
from fsdpq.launch.slurm.training_job import ranks_per_node, read_setup
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.frozen import read_frozen
from fsdpq.sweep.outcome import Outcome
from fsdpq.sweep.running.run import RunOptions, TrialRunner
from fsdpq.sweep.running.screen import SweepScreen
from fsdpq.sweep.running.slots import Slots
from fsdpq.sweep.trial import Trial

TASK_VARIABLE = "SLURM_ARRAY_TASK_ID"
"""Slurm's number of a task, counted from 0 here."""


@dataclass(frozen=True)
class ArrayOptions:
    """How trials become an array.

    Attributes:
        at_once: tasks that run at the same time; None is as many as the cluster lets.
        smoke: trials are only tried, on CPUs.
        retry_failed: tasks run trials again that failed.
        trust_remote_code: let trials run Python code that their models bring.
        setup: file of shell lines that come first; None is the user's own, where there is one.
    """

    at_once: int | None = None
    smoke: bool = False
    retry_failed: bool = False
    trust_remote_code: bool = False
    setup: Path | None = None


def array_job(files: SweepFiles, name: str, trials: Sequence[Trial], options: ArrayOptions) -> Job:
    """Returns the array that runs trials.

    Args:
        files: the sweep directory.
        name: of the sweep.
        trials: at least one; they ask for the same of Slurm.
        options: how.

    Raises:
        RecipeError: they ask for different things, or not for what a job needs.
    """
    if problems := list(_problems_of(trials, smoke=options.smoke)):
        raise RecipeError(problems)
    recipe = trials[0].recipe
    on_cpu = options.smoke or recipe.launch.device == "cpu"
    flags = [
        *([TRUST_FLAG] if options.trust_remote_code else []),
        *(["--retry-failed"] if options.retry_failed else []),
    ]
    root = files.root.absolute()
    return Job(
        name=name,
        command=(sys.executable, "-m", "fsdpq", "sweep", str(root), "--array-task", *flags),
        options=recipe.launch.slurm,
        num_nodes=1,
        ranks_per_node=ranks_per_node(recipe),
        device="cpu" if on_cpu else "cuda",
        folder=JobFiles.of(root).folder,
        work_dir=Path.cwd(),
        num_tasks=len(trials),
        most_at_once=options.at_once,
        setup=read_setup(options.setup),
    )


def write_tasks(files: SweepFiles, trials: Sequence[Trial]) -> None:
    """Writes which trial each task of the array has."""
    path = _tasks_file(files)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"trials": [trial.id for trial in trials]}
    write_whole(path, (json.dumps(content) + "\n").encode())


def describe_array(files: SweepFiles) -> str:
    """Returns how the array of a sweep stands that waits or runs, empty where none does.

    Raises:
        EnvironmentProblemError: Slurm gives no answer.
    """
    record = read_record(JobFiles.of(files.root))
    if record is None:
        return ""
    facts = query_jobs([record.id])
    waiting = sum(each.phase == "queued" for each in facts)
    running = sum(each.phase == "running" for each in facts)
    if not waiting + running:
        return ""
    return f"array {record.id} is at work: {running} of its trials run, {waiting} wait"


def run_array_task(
    files: SweepFiles, options: RunOptions, *, screen: SweepScreen, order: Sequence[Trial] = ()
) -> Outcome:
    """Runs the trial of this task of an array to its end.

    Args:
        files: the sweep directory.
        options: how.
        screen: shows what happens.
        order: all trials, where they are known already.

    Raises:
        UsageError: this is no task of the sweep's array.
    """
    trials = list(order) or read_frozen(files)
    trial = _trial_of_task(files, trials)
    with hold(files.root), catch_stop_signals() as stop:
        slots = Slots(1, gpus=[], threads_are_set=True)
        runner = TrialRunner(files, options, slots=slots, screen=screen, stop=stop)
        runner.know(trials)
        try:
            [outcome] = runner.run([trial])
        finally:
            screen.close()
    return outcome


def task_exit_code(outcome: Outcome) -> int:
    """Returns what a task tells Slurm: the job queues itself again where it was interrupted."""
    if outcome.status in ("finished", "hopeless", "skipped"):
        return int(ExitCode.OK)
    code = outcome.exit_code
    if code is None:
        return int(ExitCode.INTERRUPTED)
    return code if code >= 0 else 128 - code


def _trial_of_task(files: SweepFiles, trials: Sequence[Trial]) -> Trial:
    number = os.environ.get(TASK_VARIABLE, "")
    try:
        ids = json.loads(_tasks_file(files).read_text(encoding="utf-8"))["trials"]
        wanted = ids[int(number)] if number.isdecimal() else None
        return next(trial for trial in trials if trial.id == wanted)
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration):
        message = f"`{files.root}` has no trial for the task `{number}` of an array"
        hint = "Slurm runs tasks: submit them with `fsdpq sweep --scheduler slurm`"
        raise UsageError(message, hint=hint) from None


def _tasks_file(files: SweepFiles) -> Path:
    return JobFiles.of(files.root).folder / "array.json"


def _problems_of(trials: Sequence[Trial], *, smoke: bool) -> Iterator[Problem]:
    launches = [trial.recipe.launch for trial in trials]
    for key in ("slurm", "device", "nproc_per_node"):
        values = {repr(getattr(launch, key)) for launch in launches}
        if len(values) > 1:
            message = f"the trials of an array ask Slurm for the same, and `launch.{key}` differs"
            yield Problem(message, f"launch.{key}", hint="make a sweep for each of its values")
    first = launches[0]
    on_cpu = smoke or first.device == "cpu"
    told = first.nproc_per_node != "auto" or first.slurm.gpus_per_node is not None
    if not on_cpu and not told:
        hint = "set it to the GPUs of a trial, or `launch.device=cpu`"
        yield Problem(
            "nothing says how many GPUs a trial needs", "launch.nproc_per_node", hint=hint
        )
