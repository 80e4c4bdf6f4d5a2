"""The flow of ``fsdpq sweep``: from a checked sweep to trials that have run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.ranks.processes import catch_stop_signals
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.choosing.options import OptunaOptions
from fsdpq.sweep.choosing.space import make_space
from fsdpq.sweep.choosing.spec import LoadedSpec, dump_spec
from fsdpq.sweep.choosing.trial_checks import check_trials
from fsdpq.sweep.frozen import freeze, read_frozen
from fsdpq.sweep.outcome import Outcome, read_outcome
from fsdpq.sweep.results.collect import goal_of
from fsdpq.sweep.running.array import describe_array
from fsdpq.sweep.running.ownership import owned_sweep
from fsdpq.sweep.running.request import (
    SweepEnd,
    SweepRequest,
    choose,
    count_at_once,
    end_of,
    plan_filter,
    run_options,
    sweep_files,
    trials_of,
)
from fsdpq.sweep.running.run import TrialRunner
from fsdpq.sweep.running.screen import SweepScreen
from fsdpq.sweep.running.search import Search
from fsdpq.sweep.running.slots import Slots
from fsdpq.sweep.running.submission import submit_sweep
from fsdpq.sweep.trial import Trial

MAX_NAME = 100


def run_sweep(loaded: LoadedSpec, request: SweepRequest, *, screen: SweepScreen) -> SweepEnd:
    """Runs a sweep, or goes on with it.

    Args:
        loaded: the sweep.
        request: what the user wants of it.
        screen: shows what happens.

    Raises:
        UsageError: the directory is in use, or holds something else.
        EnvironmentProblemError: it cannot be written.
        RecipeError: with all Problems of the sweep and its recipes.
    """
    files = sweep_files(loaded, request.out)
    trials = trials_of(files, loaded, request, screen)
    check_trials(loaded, trials)
    if loaded.spec.scheduler == "slurm" and (told := describe_array(files)):
        screen.report(told)  # its tasks hold the directory
        return end_of(files, choose(trials, request.only))
    try:
        return _run_owned(files, loaded, request, trials, screen=screen)
    except OSError as error:
        message = f"the sweep `{files.root}` cannot be written: {error.strerror or error}"
        hint = "make room or name another place with `--out`; what is there is kept"
        raise EnvironmentProblemError(message, hint=hint, details=str(error)) from error


def _run_owned(
    files: SweepFiles,
    loaded: LoadedSpec,
    request: SweepRequest,
    trials: Sequence[Trial],
    *,
    screen: SweepScreen,
) -> SweepEnd:
    files.root.mkdir(parents=True, exist_ok=True)
    with owned_sweep(files):
        write_whole(files.spec, dump_spec(_named(loaded), files.root).encode())
        freeze(files, trials)
        if loaded.spec.scheduler == "slurm":
            return submit_sweep(files, loaded, request, trials, screen=screen)
        return _run(files, loaded, request, trials, screen=screen)


def _run(
    files: SweepFiles,
    loaded: LoadedSpec,
    request: SweepRequest,
    trials: Sequence[Trial],
    *,
    screen: SweepScreen,
) -> SweepEnd:
    spec = loaded.spec
    gpus = [] if spec.smoke else list_gpus()
    at_once = count_at_once(loaded, trials, num_gpus=len(gpus))
    options = run_options(loaded, request, at_once=at_once)
    threads_are_set = "OMP_NUM_THREADS" in os.environ
    slots = Slots(at_once, gpus=gpus, threads_are_set=threads_are_set)
    with catch_stop_signals() as stop:
        runner = TrialRunner(files, options, slots=slots, screen=screen, stop=stop)

        def run_round(asked: Sequence[Trial]) -> Sequence[Outcome]:
            check_trials(loaded, asked)
            freeze(files, asked)
            return runner.run(asked)

        try:
            if isinstance(spec.strategy, OptunaOptions):
                known = read_frozen(files)
                space = make_space(loaded)
                search = Search(files, space, spec.strategy, goal_of(spec.goal), known, at_once)
                chosen = search.run(run_round, stop)
            else:
                chosen = choose(trials, request.only)
                runner.run(chosen)
        finally:
            screen.close()
    return end_of(files, chosen, stopped_by=stop.name)


@dataclass(frozen=True)
class ListedTrial:
    """A trial, and what became or will become of it.

    Attributes:
        trial: of the sweep.
        outcome: as it stands; ``skipped`` where the plan says that it cannot fit.
    """

    trial: Trial
    outcome: Outcome


def list_sweep(
    loaded: LoadedSpec, request: SweepRequest, *, screen: SweepScreen
) -> list[ListedTrial]:
    """Returns the trials of a sweep without running any; see `run_sweep`."""
    files = sweep_files(loaded, request.out)
    trials = trials_of(files, loaded, request, screen)
    check_trials(loaded, trials)
    known = read_frozen(files) if files.trials.exists() else []
    found = {trial.id: trial for trial in [*known, *trials]}
    gpus = [] if loaded.spec.smoke else list_gpus()
    at_once = count_at_once(loaded, trials, num_gpus=len(gpus))
    why_not = plan_filter(loaded, request, at_once=at_once)
    listed: list[ListedTrial] = []
    for trial in choose(list(found.values()), request.only):
        outcome = read_outcome(files, trial.id)
        reason = why_not(trial) if outcome.status in ("waiting", "skipped") else ""
        outcome = replace(outcome, status="skipped", reason=reason) if reason else outcome
        listed.append(ListedTrial(trial, outcome))
    return listed


def _named(loaded: LoadedSpec) -> LoadedSpec:
    """Returns the sweep with its name in it: in its directory the file is called something else."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", loaded.name).lstrip("._-")[:MAX_NAME]
    return replace(loaded, spec=loaded.spec.model_copy(update={"name": name}))
