"""What the launcher does for a run while its ranks work: asks them to save, sees when they hang."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fsdpq.errors import RunSavedError, RunStoppedError
from fsdpq.launch.ranks.failure import FULL_DISK_BYTES
from fsdpq.launch.ranks.logs import bound_logs
from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, step_of

SAVING = "saving after this step; press Ctrl-C again to end at once"
FINISHING = "what is trained is written already or being written; press Ctrl-C again to end at once"

LOOK_S = 2.0
"""Time between two looks at the disk and the logs."""


class Others(Protocol):
    """The other machines of a run, as the launcher of the first of them has them."""

    @property
    def wish(self) -> str:
        """Name of the signal by which somebody on another machine asked for an end, or empty."""
        ...

    @property
    def insists(self) -> bool:
        """Whether somebody there asked again."""
        ...

    def check(self, watch: HangWatch) -> None:
        """Looks once; raises where a machine is lost, its ranks have ended, or ranks hang."""
        ...


class RunKeeper:
    """Keeps one training run: give it the rows of the ranks, and ask it while they run.

    Args:
        files: the run directory.
        watch: sees when the ranks hang.
        report: told one line when the ranks are asked to end.
        others: the other machines of the run, if any.
    """

    def __init__(
        self,
        files: RunFiles,
        watch: HangWatch,
        report: Callable[[str], Any],
        *,
        others: Others | None = None,
    ) -> None:
        self._files = files
        self._others = others
        self._watch = watch
        self._report = report
        self._phase = ""
        self._trains = False
        self._asked = False
        self._signal = ""
        self._stopped: dict[str, Any] | None = None
        self._next_look = 0.0
        self._disk_problem = ""
        files.stop_request.unlink(missing_ok=True)

    def take(self, row: dict[str, Any]) -> None:
        """Takes one row of events."""
        event = row.get("event")
        if event == "phase":
            self._phase = row["name"]
            self._trains = self._trains or self._phase == "train"
        elif event == "stop":
            self._signal = row["signal"]
        elif event == "stopped":
            self._stopped = row

    def check(self) -> None:
        """Says that the disk is full or gone, and bounds logs; raises LaunchError where ranks hang.

        The ranks cannot say it: what they tell is a file there.
        """
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            problem = _disk_problem(self._files.root)
            if problem and problem != self._disk_problem:
                self._report(f"{problem}: training goes on, and writes when it can again")
            self._disk_problem = problem
            with contextlib.suppress(OSError):  # a disk that is gone was told of just now
                bound_logs(self._files)
        if self._others is None:
            self._watch.check()
        else:
            self._others.check(self._watch)

    def asked(self, stop: StopSignals) -> tuple[str, bool]:
        """Returns the signal that asks for an end, here or on another machine, or nothing.

        Returns:
            Its name, and whether somebody insists.
        """
        if self._others is None:
            return stop.name, stop.insists
        return stop.name or self._others.wish, stop.insists or self._others.insists

    def stopped(self, total_steps: int | None) -> RunStoppedError | None:
        """Returns the one line for a run that its ranks ended as they were asked to, else None.

        Args:
            total_steps: of the run, None where that is not known.
        """
        if self._stopped is None:
            return None
        step, go_on = self._stopped["step"], resume_hint(self._files)
        message = f"stopped by {self._signal} after step {step}"
        message += f" of {total_steps}" if total_steps else ""
        if self._stopped["directory"] is not None:
            return RunSavedError(f"{message}; saved: {go_on}")
        message += ", which could not be saved"
        if go_on:
            return RunSavedError(f"{message}; {go_on}")
        where = f"its metrics and logs are in `{self._files.root}`"
        return RunStoppedError(f"{message}, and there is no checkpoint; {where}")

    def ask_to_end(self, signal_name: str) -> bool:
        """Asks the ranks to save and end, once; returns False where they have nothing to save.

        Before training there is nothing that was not there at the start.
        """
        if not self._trains:
            return False
        if not self._asked:
            self._asked = True
            self._report(FINISHING if self._phase in ("export", "tasks", "report") else SAVING)
            self._send(signal_name)
        return True

    def _send(self, signal_name: str) -> None:
        try:
            self._files.stop_request.write_text(signal_name)
        except OSError:  # a disk that is full or gone; they hear signals too
            for pid in self._watch.pids():
                os.kill(pid, signal.SIGTERM)


def _disk_problem(root: Path) -> str:
    """Returns what is wrong with a run directory's place, nothing where all is well."""
    try:
        if not root.is_dir():
            return f"the run directory `{root}` is gone"
        if shutil.disk_usage(root).free < FULL_DISK_BYTES:
            return f"the disk of `{root}` is full: make room"
    except OSError as error:
        return f"the run directory `{root}` cannot be read ({error.strerror})"
    return ""


def resume_hint(files: RunFiles) -> str:
    """Returns how to go on from the newest checkpoint, empty where there is none."""
    found = list_checkpoints(files.checkpoints)
    if not found:
        return ""
    return f"go on from step {step_of(found[0])} with `fsdpq resume {shlex.quote(str(files.root))}`"
