"""The flow of ``fsdpq sweep``: from a checked sweep to trials that have run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fsdpq.errors import ExitCode, Problem, RecipeError, UsageError
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.machine.this_machine import describe_this_machine
from fsdpq.launch.ranks.processes import catch_stop_signals
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import Machine
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.collect import goal_of
from fsdpq.sweep.early_stopping import MedianRule
from fsdpq.sweep.expand import expand
from fsdpq.sweep.fit import why_not as explain_shortage
from fsdpq.sweep.frozen import freeze, read_frozen
from fsdpq.sweep.options import MedianStoppingOptions, OptunaOptions
from fsdpq.sweep.outcome import Outcome, read_outcome
from fsdpq.sweep.ownership import owned_sweep
from fsdpq.sweep.run import RunOptions, TrialRunner, WhyNot
from fsdpq.sweep.screen import SweepScreen
from fsdpq.sweep.search import Search
from fsdpq.sweep.slots import Slots
from fsdpq.sweep.space import make_space
from fsdpq.sweep.spec import LoadedSpec, dump_spec
from fsdpq.sweep.trial import Trial
from fsdpq.sweep.trial_process import TRAIN, TrialOptions

SWEEPS = Path("sweeps")
MAX_NAME = 100


@dataclass(frozen=True)
class SweepRequest:
    """What the user wants of a sweep, beside what it is.

    Attributes:
        out: its directory; None is ``sweeps/<name>-<digest>``.
        gpus: of the machine that trials are planned for, ``2x24GiB``; None is this one.
        only: ids of the trials to run; none is all.
        retry_failed: run those again that failed.
        as_frozen: run the trials that the directory has, whatever the recipe says now.
        trust_remote_code: let trials run Python code that their models bring.
        train: the command that trains a trial.
    """

    out: Path | None = None
    gpus: str | None = None
    only: tuple[str, ...] = ()
    retry_failed: bool = False
    as_frozen: bool = False
    trust_remote_code: bool = False
    train: Sequence[str] = TRAIN


@dataclass(frozen=True)
class SweepEnd:
    """How far a sweep came.

    Attributes:
        files: the sweep directory.
        trials: all that it has, in order.
        outcomes: what became of each.
        stopped_by: name of the signal that ended it, else empty.
        concerned: ids of the trials that this call was about.
    """

    files: SweepFiles
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    stopped_by: str = ""
    concerned: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def exit_code(self) -> ExitCode:
        """What the process tells the shell; verdicts come on top."""
        statuses = [o.status for o in self.outcomes if o.id in self.concerned]
        if self.stopped_by or {"interrupted", "running", "waiting"} & set(statuses):
            kept = any(o.status not in ("waiting", "skipped") for o in self.outcomes)
            return ExitCode.SAVED if kept else ExitCode.INTERRUPTED
        if "failed" in statuses:
            return ExitCode.RUN_FAILED
        if statuses and all(status == "skipped" for status in statuses):
            return ExitCode.DOES_NOT_FIT
        return ExitCode.OK


def sweep_files(loaded: LoadedSpec, out: Path | None) -> SweepFiles:
    """Returns the directory of a sweep, which may not be there yet.

    Args:
        loaded: the sweep.
        out: as the user named it; None is ``sweeps/<name>-<digest>``.

    Raises:
        UsageError: ``out`` is something else.
    """
    files = SweepFiles(out if out is not None else SWEEPS / f"{loaded.name}-{loaded.digest}")
    if files.root.is_file():
        raise UsageError(f"`{files.root}` is a file", hint="name a directory with `--out`")
    if files.root.is_dir() and not files.spec.exists() and any(files.root.iterdir()):
        message = f"`{files.root}` exists and holds no sweep"
        raise UsageError(message, hint="name another directory with `--out`")
    return files


def run_sweep(loaded: LoadedSpec, request: SweepRequest, *, screen: SweepScreen) -> SweepEnd:
    """Runs a sweep, or goes on with it.

    Args:
        loaded: the sweep.
        request: what the user wants of it.
        screen: shows what happens.

    Raises:
        UsageError: the directory is in use, or holds something else.
        RecipeError: with all Problems of the sweep and its recipes.
    """
    files = sweep_files(loaded, request.out)
    trials = _trials_of(files, loaded, request, screen)
    check_trials(loaded, trials)
    files.root.mkdir(parents=True, exist_ok=True)
    with owned_sweep(files):
        write_whole(files.spec, dump_spec(_named(loaded), files.root).encode())
        freeze(files, trials)
        return _run(files, loaded, request, trials, screen=screen)


def list_trials(loaded: LoadedSpec, screen: SweepScreen) -> list[Trial]:
    """Returns the trials of a sweep that are known before any has run: none of Optuna's."""
    if isinstance(loaded.spec.strategy, OptunaOptions):
        return []
    expansion = expand(loaded)
    for notice in expansion.notices:
        screen.report(f"note: {notice}")
    if expansion.duplicates:
        number = expansion.duplicates
        screen.report(f"{number} combination{'s' * (number > 1)} left out: an earlier one is equal")
    for left_out in expansion.left_out:
        screen.report(f"left out: {left_out.reason}")
    return list(expansion.trials)


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
    trials = _trials_of(files, loaded, request, screen)
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


def _trials_of(
    files: SweepFiles, loaded: LoadedSpec, request: SweepRequest, screen: SweepScreen
) -> list[Trial]:
    if request.as_frozen and not isinstance(loaded.spec.strategy, OptunaOptions):
        return read_frozen(files)
    return list_trials(loaded, screen)


def check_trials(loaded: LoadedSpec, trials: Sequence[Trial]) -> None:
    """Checks what only a sweep asks of its recipes.

    Raises:
        RecipeError: with all Problems.
    """
    problems = list(_problems_of(loaded, trials))
    if problems:
        raise RecipeError(problems)


def _problems_of(loaded: LoadedSpec, trials: Sequence[Trial]) -> Iterator[Problem]:
    recipes = [trial.recipe for trial in trials]
    stops_early = isinstance(loaded.spec.early_stopping, MedianStoppingOptions)
    if stops_early and any(recipe.training.eval_interval is None for recipe in recipes):
        message = "`early_stopping` compares held-out losses on the way, and there are none"
        yield Problem(message, "early_stopping", hint="set `training.eval_interval`")
    at_once = loaded.spec.parallel != 1
    if at_once and any(recipe.launch.rdzv_endpoint is not None for recipe in recipes):
        message = "trials that run at the same time cannot share `launch.rdzv_endpoint`"
        yield Problem(message, "launch.rdzv_endpoint", hint="delete it: a free port is found")
    if any(recipe.launch.nnodes != 1 for recipe in recipes):
        message = "a trial runs on one machine, and `launch.nnodes` asks for more"
        yield Problem(message, "launch.nnodes", hint="set `launch.nnodes=1`")


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
    options = _run_options(loaded, request, at_once=at_once)
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
    everything = tuple(read_frozen(files))
    outcomes = tuple(read_outcome(files, trial.id) for trial in everything)
    concerned = frozenset(trial.id for trial in chosen)
    return SweepEnd(files, everything, outcomes, stop.name, concerned)


def _run_options(loaded: LoadedSpec, request: SweepRequest, *, at_once: int) -> RunOptions:
    smoke, trust = loaded.spec.smoke, request.trust_remote_code
    return RunOptions(
        TrialOptions(loaded.name, smoke, trust, request.train),
        rule=_rule_of(loaded),
        why_not=plan_filter(loaded, request, at_once=at_once),
        retry_failed=request.retry_failed,
    )


def choose(trials: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    """Returns the trials with these ids, all where none is named.

    Raises:
        UsageError: there is none with one of them.
    """
    known = {trial.id for trial in trials}
    unknown = [trial_id for trial_id in only if trial_id not in known]
    if unknown:
        message = f"the sweep has no trial `{unknown[0]}`"
        raise UsageError(message, hint="`fsdpq sweep ... --list` shows their ids")
    return [trial for trial in trials if not only or trial.id in only]


def count_at_once(loaded: LoadedSpec, trials: Sequence[Trial], *, num_gpus: int) -> int:
    """Returns how many trials run at the same time; ``auto`` is as many as have GPUs.

    Args:
        loaded: the sweep.
        trials: those that are known.
        num_gpus: of this machine.
    """
    if loaded.spec.parallel != "auto":
        return int(loaded.spec.parallel)
    asked = [trial.recipe.launch.nproc_per_node for trial in trials]
    ranks = [num_gpus if number == "auto" else int(number) for number in asked]
    return max(1, num_gpus // max([1, *ranks] if ranks else [1, num_gpus]))


def plan_filter(loaded: LoadedSpec, request: SweepRequest, *, at_once: int) -> WhyNot:
    """Returns what says why a trial cannot fit by plan: on its share of the GPUs.

    Args:
        loaded: the sweep.
        request: may name other GPUs than those of this machine.
        at_once: trials that run at the same time.
    """
    if loaded.spec.smoke:
        return lambda _: ""
    own = request.gpus is None
    machine = describe_this_machine() if own else Machine(parse_gpus(request.gpus or ""))
    gpus = machine.gpus or ()

    def why_not(trial: Trial) -> str:
        shares = at_once > 1 and trial.recipe.launch.nproc_per_node == "auto"
        share = gpus[: max(1, len(gpus) // at_once)] if shares else gpus
        return explain_shortage(trial, replace(machine, gpus=share))

    return why_not


def _named(loaded: LoadedSpec) -> LoadedSpec:
    """Returns the sweep with its name in it: in its directory the file is called something else."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", loaded.name).lstrip("._-")[:MAX_NAME]
    return replace(loaded, spec=loaded.spec.model_copy(update={"name": name}))


def _rule_of(loaded: LoadedSpec) -> MedianRule | None:
    stopping = loaded.spec.early_stopping
    if not isinstance(stopping, MedianStoppingOptions):
        return None
    return MedianRule(min_steps=stopping.min_steps, min_trials=stopping.min_trials)
