"""The launcher's side of tracking: starts the process that sends a run, and ends it in time.

Nothing of it can hurt training. The process only reads the run directory; where it fails, hangs or
is slow, the user is told, and the run ends without it after a bound.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fsdpq.errors import LaunchError, RunStoppedError
from fsdpq.launch.ranks.processes import (
    HUB_TOKENS,
    ProcessTree,
    StopSignals,
    catch_stop_signals,
)
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import WandbOptions
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.tracking import read_tracker_state
from fsdpq.run_files.writing import append_json_line

PROGRAM = ("-m", "fsdpq.launch.tracking.wandb_process")

MODES = ("online", "offline", "disabled")
"""From what sends most to what sends nothing."""

INIT_TIMEOUT_S = "30"
"""How long the service may take to answer at the start; training goes on meanwhile."""

START_S = 35.0
"""How long a finished run waits for a process that begins slowly, beside what is left to send."""

STOPPED_S = 8.0
"""How long a run that failed or was stopped waits: a scheduler may be about to end everything."""

PATIENCE_S = 3.0
"""After so long the user is told what is waited for."""

NOT_OURS = ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID")
"""Variables by which the run would become part of another one around it."""


@dataclass
class Tracker:
    """One process that sends a run.

    Attributes:
        files: the run directory.
        report: told one line for everything that the user should know.
        timeout_s: how long what is left may take at the end.
        tree: the process; None where it could not be started, or none is wanted.
    """

    files: RunFiles
    report: Callable[[str], Any]
    timeout_s: float = 0.0
    tree: ProcessTree | None = None
    _num_told: int = 0
    _url: str = ""
    _changed: int = field(default=0)

    def look(self) -> None:
        """Tells the user what the process has said since the last look."""
        if self.tree is None or not self.files.wandb.exists():
            return
        changed = self.files.wandb.stat().st_mtime_ns
        state = read_tracker_state(self.files.wandb) if changed != self._changed else None
        if state is None:
            return
        self._changed = changed
        if state.url and state.url != self._url:
            self._url = state.url
            self._tell(f"wandb: {state.url}", url=state.url)
        for notice in state.notices[self._num_told :]:
            self._tell(notice)
        self._num_told = len(state.notices)

    def end(self, outcome: str) -> None:
        """Says how the run ended, waits for what is left to send, and ends the process.

        A signal ends the waiting: what became of the run does not change by it.
        """
        if self.tree is None:
            return
        limit_s = self.timeout_s + START_S if outcome == "finished" else STOPPED_S
        try:
            self._say(outcome)
            with catch_stop_signals() as stop:
                waited_s = self._wait(self.tree, limit_s, stop)
            self.look()
            code = self.tree.poll()
            if code is None:
                self._tell(
                    f"wandb was not done {waited_s:.0f} s after the end of the run, and is not "
                    f"waited for: its files are in `{self.files.root / 'wandb'}`"
                )
            elif code != 0 and self._num_told == 0:
                log = self.files.wandb_log
                self._tell(f"wandb ended with exit code {code}: its log is `{log}`")
        finally:
            self.tree.kill()
            if self.tree.output is not None:
                self.tree.output.close()

    def _wait(self, tree: ProcessTree, limit_s: float, stop: StopSignals) -> float:
        """Waits until the process has ended, or the limit, or a signal; returns for how long."""
        began = time.monotonic()
        is_told = False
        while tree.wait(stop, timeout_s=0.2) is None and not stop.received:
            waited_s = time.monotonic() - began
            if waited_s > limit_s:
                break
            if waited_s > PATIENCE_S and not is_told:
                is_told = True
                self.report(f"waiting for wandb, {limit_s:.0f} s at most; Ctrl-C ends the waiting")
            self.look()
        return time.monotonic() - began

    def _say(self, outcome: str) -> None:
        pipe = self.tree.input if self.tree is not None else None
        if pipe is None:
            return
        try:
            pipe.write(f"{outcome}\n".encode())
            pipe.close()
        except BrokenPipeError:  # it has ended: what it said comes next
            return

    def _tell(self, message: str, **facts: str) -> None:
        """Tells the user, and the run's events."""
        self.report(message)
        row = {"event": "tracking", "message": message, **facts, "time": time.time()}
        try:
            append_json_line(self.files.events, row)
        except OSError as error:
            self.report(f"{self.files.events} takes no rows: {error}")


@contextmanager
def tracked(
    files: RunFiles, recipe: Recipe, *, report: Callable[[str], Any]
) -> Generator[Tracker, None, None]:
    """Has a run sent to Weights & Biases while the block runs, where its recipe asks for that.

    Args:
        files: the run directory.
        recipe: resolved.
        report: told one line for everything that the user should know.
    """
    tracker = Tracker(files, report)
    if "wandb" in recipe.metrics.sinks:
        _start(tracker, recipe.metrics.wandb)
    try:
        yield tracker
    except BaseException as error:
        tracker.end("stopped" if isinstance(error, RunStoppedError) else "failed")
        raise
    tracker.end("finished")


def wanted_mode(options: WandbOptions) -> str:
    """Returns the mode of the recipe, or that of ``WANDB_MODE`` where it sends less."""
    asked = os.environ.get("WANDB_MODE", options.mode).replace("dryrun", "offline")
    return max(options.mode, asked if asked in MODES else options.mode, key=MODES.index)


def tracker_environment() -> dict[str, str]:
    """Returns the environment of the process: the user's, without the hub's token."""
    kept_away = {*HUB_TOKENS, *NOT_OURS}
    environment = {name: value for name, value in os.environ.items() if name not in kept_away}
    environment.setdefault("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)
    return {**environment, "WANDB_ERROR_REPORTING": "false"}


def _start(tracker: Tracker, options: WandbOptions) -> None:
    mode = wanted_mode(options)
    if mode == "disabled":
        return
    tracker.timeout_s = options.finish_timeout_s
    files = tracker.files
    arguments = [str(files.root), mode, repr(time.time())]
    try:
        files.logs.mkdir(exist_ok=True)
        tracker.tree = ProcessTree(
            [sys.executable, *PROGRAM, *arguments],
            environment=tracker_environment(),
            stdout=None,
            stderr=files.wandb_log,
        )
    except (OSError, LaunchError) as error:
        tracker.report(f"wandb cannot be started: {error}")
