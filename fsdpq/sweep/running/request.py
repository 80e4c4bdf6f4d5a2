"""What is wanted of a sweep, and what follows from it: its directory, its trials, how they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fsdpq.errors import ExitCode, UsageError
from fsdpq.launch.machine.this_machine import describe_this_machine
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import Machine
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.fit import why_not as explain_shortage
from fsdpq.sweep.choosing.options import MedianStoppingOptions, OptunaOptions
from fsdpq.sweep.choosing.spec import LoadedSpec
from fsdpq.sweep.frozen import read_frozen
from fsdpq.sweep.outcome import Outcome, read_outcome
from fsdpq.sweep.running.early_stopping import MedianRule
from fsdpq.sweep.running.run import RunOptions, WhyNot
from fsdpq.sweep.running.screen import SweepScreen
from fsdpq.sweep.running.trial_process import TRAIN, TrialOptions
from fsdpq.sweep.trial import Trial

SWEEPS = Path("sweeps")


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
        setup: file of shell lines that jobs of Slurm's start with; None is the user's own.
        train: the command that trains a trial.
    """

    out: Path | None = None
    gpus: str | None = None
    only: tuple[str, ...] = ()
    retry_failed: bool = False
    as_frozen: bool = False
    trust_remote_code: bool = False
    setup: Path | None = None
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
        job: number of the array that was submitted, None where none was.
    """

    files: SweepFiles
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    stopped_by: str = ""
    concerned: frozenset[str] = field(default_factory=frozenset[str])
    job: int | None = None

    @property
    def exit_code(self) -> ExitCode:
        """What the process tells the shell; verdicts come on top."""
        if self.job is not None:
            return ExitCode.OK
        statuses = [o.status for o in self.outcomes if o.id in self.concerned]
        if self.stopped_by or {"interrupted", "running", "waiting"} & set(statuses):
            kept = any(_is_kept(outcome) for outcome in self.outcomes)
            return ExitCode.SAVED if kept or not self.stopped_by else ExitCode.INTERRUPTED
        if "failed" in statuses:
            return ExitCode.RUN_FAILED
        if statuses and all(status == "skipped" for status in statuses):
            return ExitCode.DOES_NOT_FIT
        return ExitCode.OK


def _is_kept(outcome: Outcome) -> bool:
    """Whether a sweep that goes on has less to do for a trial than one that begins."""
    is_done = outcome.status in ("finished", "failed", "hopeless")
    return is_done or outcome.exit_code == ExitCode.SAVED


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


def trials_of(
    files: SweepFiles, loaded: LoadedSpec, request: SweepRequest, screen: SweepScreen
) -> list[Trial]:
    """Returns the trials of a sweep that are known now, as frozen where that is wanted.

    Args:
        files: the sweep directory.
        loaded: the sweep.
        request: what the user wants.
        screen: told what was left out, and why.

    Raises:
        RecipeError: with all Problems of the recipes.
    """
    if request.as_frozen and not isinstance(loaded.spec.strategy, OptunaOptions):
        return read_frozen(files)
    return list_trials(loaded, screen)


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


def run_options(loaded: LoadedSpec, request: SweepRequest, *, at_once: int) -> RunOptions:
    """Returns how a sweep runs its trials.

    Args:
        loaded: the sweep.
        request: what the user wants.
        at_once: trials that run at the same time.
    """
    smoke, trust = loaded.spec.smoke, request.trust_remote_code
    return RunOptions(
        TrialOptions(loaded.name, smoke, trust, request.train),
        rule=_rule_of(loaded),
        why_not=plan_filter(loaded, request, at_once=at_once),
        retry_failed=request.retry_failed,
    )


def _rule_of(loaded: LoadedSpec) -> MedianRule | None:
    stopping = loaded.spec.early_stopping
    if not isinstance(stopping, MedianStoppingOptions):
        return None
    return MedianRule(min_steps=stopping.min_steps, min_trials=stopping.min_trials)


def end_of(
    files: SweepFiles, chosen: Sequence[Trial], *, stopped_by: str = "", job: int | None = None
) -> SweepEnd:
    """Returns how far a sweep came, by its files.

    Args:
        files: the sweep directory.
        chosen: the trials that this call was about.
        stopped_by: name of the signal that ended it.
        job: number of the array that was submitted.
    """
    trials = tuple(read_frozen(files))
    outcomes = tuple(read_outcome(files, trial.id) for trial in trials)
    return SweepEnd(files, trials, outcomes, stopped_by, frozenset(t.id for t in chosen), job)
