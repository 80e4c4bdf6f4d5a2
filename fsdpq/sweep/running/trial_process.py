"""One trial at work: a ``fsdpq train`` of its own, and what it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsdpq.launch.parent import PARENT_PID
from fsdpq.launch.ranks.processes import ProcessTree, StopSignals
from fsdpq.launch.ranks.torchrun import JsonLinesTail, Row
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.launch import SlurmOptions
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import Outcome, read_outcome, write_outcome
from fsdpq.sweep.running.endings import settle
from fsdpq.sweep.running.slots import Slot
from fsdpq.sweep.trial import Trial

TRAIN = (sys.executable, "-m", "fsdpq", "train")
"""The command that trains a trial; the recipe and the options follow."""


@dataclass(frozen=True)
class TrialOptions:
    """How the trials of a sweep are started.

    Attributes:
        sweep_name: group of the trials at Weights & Biases, where a recipe names none.
        smoke: only try them (``--smoke``).
        trust_remote_code: let them run Python code that their models bring.
        train: the command that trains one.
    """

    sweep_name: str = ""
    smoke: bool = False
    trust_remote_code: bool = False
    train: Sequence[str] = TRAIN


class TrialProcess:
    """Starts a trial, or goes on with it.

    Args:
        files: the sweep directory.
        trial: what is trained.
        options: how.
        slot: where.

    Attributes:
        outcome: as it stands; `settle` brings it to its end.
        asked: whether it was asked to end.
    """

    def __init__(self, files: SweepFiles, trial: Trial, options: TrialOptions, slot: Slot) -> None:
        self.trial = trial
        self.asked = False
        self._run = files.run(trial.id)
        self._log = files.log(trial.id)
        for folder in (self._run.root.parent, self._log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if options.smoke and self._run.root.is_dir():
            shutil.rmtree(self._run.root)  # seconds of work, which `--smoke` does not go on with
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        known = read_outcome(files, trial.id)
        self.outcome = Outcome(
            trial.id, "running", started=time.time(), attempts=known.attempts + 1,
            host=socket.gethostname(),
        )  # fmt: skip
        write_outcome(files, self.outcome)
        self._tails = [JsonLinesTail(self._run.events), JsonLinesTail(self._run.metrics)]
        environment = os.environ | dict(slot.environment) | {PARENT_PID: str(os.getpid())}
        self._process = ProcessTree(
            build_command(files, trial, options), environment=environment, stdout=self._log,
            appends=True,
        )  # fmt: skip

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        return self._process.poll()

    def new_rows(self) -> Iterator[Row]:
        """Yields the rows of events and metrics that are new, by their time."""
        rows = [row for tail in self._tails for row in tail.read_new()]
        yield from sorted(rows, key=lambda row: row.get("time", 0.0))

    def ask_to_end(self, *, heard: str = "") -> None:
        """Asks it to save and end, once.

        Args:
            heard: the signal that this process got, which a trial may have got too: the same one
                again would end it at once.
        """
        if not self.asked:
            self.asked = True
            other = signal.SIGTERM if heard == "SIGUSR1" else signal.SIGUSR1
            self._process.send(other if heard else signal.SIGTERM)

    def stop(self) -> None:
        """Asks it to save and end, and ends it where that takes long."""
        self._process.stop(StopSignals())

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        self.asked = True
        self._process.kill()

    def settle(self, exit_code: int) -> Outcome:
        """Returns what became of it.

        Args:
            exit_code: as `poll` returned it.
        """
        self._process.kill()  # a rank that outlives its launcher
        return settle(
            self.outcome, exit_code, files=self._run, log=self._log, log_start=self._log_start,
            asked=self.asked,
        )  # fmt: skip


def build_command(files: SweepFiles, trial: Trial, options: TrialOptions) -> list[str]:
    """Returns the command that trains a trial, or goes on with it.

    Args:
        files: the sweep directory.
        trial: what is trained.
        options: how.
    """
    command = [*options.train, str(files.recipe(trial.id)), "--base-dir"]
    command += [str(trial.base_dir.absolute()), "--run-dir", str(files.run(trial.id).root)]
    command += ["--smoke"] if options.smoke else []
    command += ["--trust-remote-code"] if options.trust_remote_code else []
    return [*command, *start_overrides(trial.recipe, options)]


def start_overrides(recipe: Recipe, options: TrialOptions) -> list[str]:
    """Returns the overrides of a trial that are not part of it.

    It goes on where it was, starts here whatever its scheduler is, and stands in the group of its
    sweep at Weights & Biases.

    Args:
        recipe: of the trial.
        options: how it is started.
    """
    overrides = [] if options.smoke else ["checkpoint.resume=auto"]
    if recipe.launch.scheduler != "local":
        overrides += ["launch.scheduler=local", *_without(recipe.launch.slurm)]
    metrics = recipe.metrics
    if options.sweep_name and "wandb" in metrics.sinks and metrics.wandb.group is None:
        overrides.append(f"metrics.wandb.group={quote_value(options.sweep_name)}")
    return overrides


def quote_value(text: str) -> str:
    """Returns a text as one value of an override."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _without(options: SlurmOptions) -> list[str]:
    """Returns overrides that set Slurm's settings back: unused ones are refused."""
    given, defaults = options.model_dump(mode="json"), SlurmOptions().model_dump(mode="json")
    changed = [name for name in given if given[name] != defaults[name]]
    return [f"launch.slurm.{name}={json.dumps(defaults[name])}" for name in changed]
