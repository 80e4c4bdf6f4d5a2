"""Giving what is left of a sweep to Slurm, and running a trial there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fsdpq.errors import UsageError
from fsdpq.launch.slurm.script import render_script
from fsdpq.launch.slurm.submit import submit
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.choosing.spec import LoadedSpec
from fsdpq.sweep.choosing.trial_checks import check_trials
from fsdpq.sweep.outcome import Outcome, is_settled, read_outcome, write_outcome
from fsdpq.sweep.running.array import ArrayOptions, array_job, run_array_task, write_tasks
from fsdpq.sweep.running.request import (
    SweepEnd,
    SweepRequest,
    choose,
    end_of,
    plan_filter,
    run_options,
    sweep_files,
    trials_of,
)
from fsdpq.sweep.running.screen import SweepScreen
from fsdpq.sweep.trial import Trial


def submit_sweep(
    files: SweepFiles,
    loaded: LoadedSpec,
    request: SweepRequest,
    trials: Sequence[Trial],
    *,
    screen: SweepScreen,
) -> SweepEnd:
    """Submits what is left of a sweep as an array; none is at work for it.

    Args:
        files: the sweep directory, which this process owns.
        loaded: the sweep.
        request: what the user wants of it.
        trials: of the sweep.
        screen: shows what happens.

    Raises:
        EnvironmentProblemError: there is no Slurm here, or it refuses the job.
        RecipeError: the trials cannot be one array.
    """
    chosen = choose(trials, request.only)
    left = list(_left_of(files, loaded, request, chosen))
    if not left:
        return end_of(files, chosen)
    job = array_job(files, loaded.name, left, _array_options(loaded, request))
    write_tasks(files, left)
    number = submit(job)
    word = "trial" if len(left) == 1 else "trials"
    screen.report(f"submitted array {number} of {len(left)} {word}; the same command again")
    screen.report("collects what they came to, and submits what was cut off")
    return end_of(files, chosen, job=number)


def show_array(loaded: LoadedSpec, request: SweepRequest, *, screen: SweepScreen) -> str:
    """Returns the script that `run_sweep` would submit to Slurm; makes nothing.

    Raises:
        UsageError: nothing is left to submit, or the sweep runs here.
        RecipeError: with all Problems.
    """
    if loaded.spec.scheduler != "slurm":
        hint = "give `--scheduler slurm`, or leave it out"
        raise UsageError("`--print` has no effect: the sweep runs on this machine", hint=hint)
    files = sweep_files(loaded, request.out)
    trials = trials_of(files, loaded, request, screen)
    check_trials(loaded, trials)
    left = list(_left_of(files, loaded, request, choose(trials, request.only)))
    if not left:
        raise UsageError("every trial has an outcome", hint="`--retry-failed` runs failed ones")
    return render_script(array_job(files, loaded.name, left, _array_options(loaded, request)))


def run_task(loaded: LoadedSpec, request: SweepRequest, *, screen: SweepScreen) -> Outcome:
    """Runs the trial of this task of an array of Slurm's; see `fsdpq.sweep.running.array`."""
    files = sweep_files(loaded, request.out)
    options = replace(run_options(loaded, request, at_once=1), why_not=None)
    return run_array_task(files, options, screen=screen)


def _left_of(
    files: SweepFiles, loaded: LoadedSpec, request: SweepRequest, trials: Sequence[Trial]
) -> Iterator[Trial]:
    """Yields the trials without an outcome that may fit on the GPUs that the user named."""
    why_not = plan_filter(loaded, request, at_once=1) if request.gpus is not None else None
    for trial in trials:
        outcome = read_outcome(files, trial.id)
        replan = why_not is not None
        if is_settled(outcome, retry_failed=request.retry_failed, replan=replan):
            continue
        reason = why_not(trial) if why_not is not None else ""
        if not reason:
            yield trial
        elif files.root.is_dir():
            write_outcome(files, replace(outcome, status="skipped", reason=reason))


def _array_options(loaded: LoadedSpec, request: SweepRequest) -> ArrayOptions:
    at_once = loaded.spec.parallel
    return ArrayOptions(
        at_once=None if at_once == "auto" else int(at_once),
        smoke=loaded.spec.smoke,
        retry_failed=request.retry_failed,
        trust_remote_code=request.trust_remote_code,
        setup=request.setup,
    )
