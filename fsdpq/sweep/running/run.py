"""Running trials to their end: one after another or several at once, and again what was cut off.

All that is known lies in files: a frozen recipe, a run directory and an outcome for each trial. A
runner that is killed at any moment loses none of it, and the next one reads where it is. A trial
whose outcome says ``running`` while nobody is at work in its run directory was cut off, and goes on
from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import Outcome, is_settled, read_outcome, write_outcome
from fsdpq.sweep.running.early_stopping import Curves, Hopeless, MedianRule
from fsdpq.sweep.running.ownership import wait_for_trial
from fsdpq.sweep.running.screen import SweepScreen
from fsdpq.sweep.running.slots import Slots
from fsdpq.sweep.running.trial_process import TrialOptions, TrialProcess
from fsdpq.sweep.trial import Trial

POLL_S = 0.1

WhyNot = Callable[[Trial], str]
"""Says why a trial cannot fit by plan; empty where it may."""


@dataclass(frozen=True)
class RunOptions:
    """How a sweep runs its trials.

    Attributes:
        trial: how each is started.
        rule: when one is ended early; None never ends one.
        why_not: asked before one starts.
        retry_failed: run those again that failed.
        smallest_pause_s: between two looks at the processes.
    """

    trial: TrialOptions
    rule: MedianRule | None = None
    why_not: WhyNot | None = None
    retry_failed: bool = False
    smallest_pause_s: float = POLL_S


class TrialRunner:
    """Runs the trials of a sweep directory that this process owns.

    Args:
        files: the sweep directory.
        options: how.
        slots: where.
        screen: shows what happens.
        stop: what asked for an end.
    """

    def __init__(
        self,
        files: SweepFiles,
        options: RunOptions,
        *,
        slots: Slots,
        screen: SweepScreen,
        stop: StopSignals,
    ) -> None:
        self._files = files
        self._options = options
        self._slots = slots
        self._screen = screen
        self._stop = stop
        self._curves = Curves(files)
        self._order: list[str] = []
        self._running: dict[str, TrialProcess] = {}
        self._hopeless: dict[str, Hopeless] = {}

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Runs trials until each has an outcome, or a signal comes; returns the outcomes.

        Args:
            trials: in order; those of an earlier call come before them.
        """
        self._order += [trial.id for trial in trials if trial.id not in self._order]
        waiting = [trial for trial in trials if not self._is_settled(trial)]
        self._screen.expect(trials, len(trials) - len(waiting))
        waiting = [trial for trial in waiting if self._is_free(trial)]
        try:
            while (waiting and not self._stop.received) or self._running:
                if not self._stop.received:
                    waiting = self._start(waiting)
                self._look()
                time.sleep(self._options.smallest_pause_s)
        finally:
            for process in self._running.values():  # an error of ours must leave none behind
                process.stop()
        return [read_outcome(self._files, trial.id) for trial in trials]

    def know(self, trials: Sequence[Trial]) -> None:
        """Tells the order of trials, of which this process may run only some.

        Args:
            trials: all of the sweep.
        """
        self._order = [trial.id for trial in trials]

    def _is_settled(self, trial: Trial) -> bool:
        outcome = read_outcome(self._files, trial.id)
        return is_settled(outcome, retry_failed=self._options.retry_failed, replan=True)

    def _is_free(self, trial: Trial) -> bool:
        return wait_for_trial(
            self._files.run(trial.id),
            report=self._screen.report,
            is_over=lambda: bool(self._stop.received),
        )

    def _start(self, waiting: list[Trial]) -> list[Trial]:
        """Starts what there is a place for, in order; returns the rest."""
        while waiting:
            trial = waiting[0]
            if self._ends_before_start(trial):
                waiting = waiting[1:]
                continue
            slot = self._slots.take(trial.id, trial.recipe, smoke=self._options.trial.smoke)
            if slot is None:
                break
            process = TrialProcess(self._files, trial, self._options.trial, slot)
            self._curves.forget(trial.id)
            self._running[trial.id] = process
            self._screen.show_start(trial, process.outcome)
            waiting = waiting[1:]
        return waiting

    def _ends_before_start(self, trial: Trial) -> bool:
        """Settles a trial that cannot fit, or was found hopeless before it could be written."""
        known = read_outcome(self._files, trial.id)
        reason = self._slots.refuse(trial.recipe, smoke=self._options.trial.smoke)
        if not reason and self._options.why_not is not None:
            reason = self._options.why_not(trial)
        if reason:
            self._write(trial, replace(known, status="skipped", reason=reason))
            return True
        if known.status in ("running", "interrupted") and (found := self._judge(trial)) is not None:
            self._write(trial, _hopeless(known, found))
            return True
        return False

    def _look(self) -> None:
        """Takes what the running trials wrote, ends who is to end, and settles who has ended."""
        if self._stop.received:
            for process in self._running.values():
                if self._stop.insists:
                    process.kill()
                else:
                    process.ask_to_end(heard=self._stop.name)
        for trial_id, process in list(self._running.items()):
            code = process.poll()
            self._take_rows(process)
            if code is None:
                continue
            outcome = process.settle(code)
            del self._running[trial_id]
            self._slots.give_back(trial_id)
            found = self._hopeless.get(trial_id)
            self._write(process.trial, outcome if found is None else _hopeless(outcome, found))

    def _take_rows(self, process: TrialProcess) -> None:
        trial, is_evaluated = process.trial, False
        for row in process.new_rows():
            self._screen.show_row(trial, row)
            is_evaluated = self._curves.take(trial.id, row) or is_evaluated
        # Also where it has ended meanwhile: a short trial is as hopeless as a longer one.
        if not is_evaluated or trial.id in self._hopeless:
            return
        if (found := self._judge(trial)) is not None:
            self._hopeless[trial.id] = found
            process.ask_to_end()

    def _judge(self, trial: Trial) -> Hopeless | None:
        if self._options.rule is None:
            return None
        before = self._order[: self._order.index(trial.id)]
        others = [
            self._curves.of(other, until=read_outcome(self._files, other).step) for other in before
        ]
        total_steps = self._curves.total_steps(trial.id)
        return self._options.rule.judge(self._curves.of(trial.id), others, total_steps=total_steps)

    def _write(self, trial: Trial, outcome: Outcome) -> None:
        write_outcome(self._files, outcome)
        self._screen.show_end(trial, outcome)


def _hopeless(outcome: Outcome, found: Hopeless) -> Outcome:
    return replace(outcome, status="hopeless", reason=found.reason, step=found.step)
