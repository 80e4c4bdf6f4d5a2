"""``python -m fsdpq.launch.tracking.wandb_process RUN_DIR MODE SINCE``: sends a run as it goes on.

All that it sends it reads in the run directory, so it can be late, be killed or begin again without
a loss; all that it says is in ``wandb.json``. Its standard input is how the run ended, a word on a
line; where that is closed without one, the launcher is gone. Torch-free.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fsdpq.launch.tracking.followed_file import FollowedFile
from fsdpq.recipe.load import load_resolved
from fsdpq.reports.run_record import Row, RunRecord, read_record, without_void
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.tracking import (
    OUTCOME_CODES,
    TrackerState,
    first_line,
    read_tracker_state,
    write_tracker_state,
)

POLL_S = 0.5


class ServiceRun(Protocol):
    """A run as the service's client knows it: `fsdpq.launch.tracking.wandb_run.WandbRun`."""

    mode: str
    url: str
    directory: Path
    step: int

    def log(self, row: Row) -> None:
        """Takes one row of ``metrics.jsonl``, of ``step`` or a later one."""
        ...

    def end(self, record: RunRecord, outcome: str) -> str:
        """Sends what is left; raises TimeoutError where it was not all, returns what failed."""
        ...

    def discard(self) -> None:
        """Ends it and removes its files."""
        ...


class Outcome:
    """How the run ended, once it has: read from standard input by a thread."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.word = "failed"
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self) -> bool:
        """Waits a moment; returns whether the run has ended."""
        return self._ended.wait(POLL_S)

    def _read(self) -> None:
        word = sys.stdin.readline().strip()
        if word in OUTCOME_CODES:
            self.word = word
        self._ended.set()


class Tracking:
    """Sends one run.

    Args:
        files: its directory.
        open_run: opens it at the service, by its id and ``online`` or ``offline``.
        mode: ``online`` or ``offline``.
        since: seconds since the epoch; rows of events before belong to earlier starts.
    """

    def __init__(
        self,
        files: RunFiles,
        open_run: Callable[[str, str], ServiceRun],
        *,
        mode: str,
        since: float,
    ) -> None:
        self._files, self._open_run, self._mode, self._since = files, open_run, mode, since
        known = read_tracker_state(files.wandb)
        self.state = TrackerState(known.run_id if known else secrets.token_hex(8))
        self._metrics, self._events = FollowedFile(files.metrics), FollowedFile(files.events)
        self._resumes: list[Row] = []
        self._given: set[tuple[str, str]] = set()  # of the step that the run is at
        self._trains = False
        self._tell()

    def send(self, outcome: Outcome) -> None:
        """Sends the run until it has ended, and then the rest."""
        run = self._open()
        while not outcome.wait():
            run = self._pass_on(run)
        run = self._pass_on(run, ended=True)
        try:
            problem = run.end(read_record(self._files), outcome.word)
        except TimeoutError:
            text = "wandb did not take everything in time (`metrics.wandb.finish_timeout_s`)"
            self._tell(f"{text}: `wandb sync {run.directory}` sends the rest", state="failed")
        else:
            self._tell(problem, state="failed" if problem else "done")

    def fail(self, error: Exception) -> None:
        """Says that nothing more is sent."""
        self._tell(
            f"wandb failed ({first_line(error)}): metrics are in metrics.jsonl", state="failed"
        )

    def _open(self) -> ServiceRun:
        """Opens the run; where the service cannot be reached, for ``wandb sync`` to send later."""
        run_id = self.state.run_id
        try:
            run = self._open_run(run_id, self._mode)
        except Exception as error:  # whatever a foreign service and its client raise
            if self._mode == "offline":
                raise
            self._mode = "offline"
            run = self._open_run(run_id, "offline")
            self._tell(
                f"wandb cannot be reached ({first_line(error)}): "
                f"`wandb sync {run.directory}` sends the run later"
            )
        self.state.mode, self.state.url = run.mode, run.url
        self.state.directory = str(run.directory)
        self._tell(state="sending")
        return run

    def _pass_on(self, run: ServiceRun, *, ended: bool = False) -> ServiceRun:
        """Gives the run what is new; returns the run that goes on.

        Nothing is given before the ranks train, or said where they resume: rows after that step
        are void. Offline a run that went back is written anew, as its file holds nothing else.
        """
        if self._events.is_another():
            self._events.rewind()
        back = self._listen()
        gone_back = self._metrics.is_another() or (back is not None and back + 1 < run.step)
        if gone_back and (run.mode == "offline" or self._metrics.is_another()):
            self._metrics.rewind()
            if run.mode == "offline":
                run.discard()
                self._given = set()
                run = self._open()
        if self._trains or ended:
            for row in without_void(self._metrics.read_new(), self._resumes):
                self._give(run, row)
        return run

    def _give(self, run: ServiceRun, row: Row) -> None:
        """Gives the run a row that it does not have: what it has of a step stays."""
        step, kind = int(row.get("step", 0)), (str(row["event"]), str(row.get("phase")))
        if step > run.step:
            self._given = set()
        if step >= run.step and kind not in self._given:
            self._given.add(kind)
            run.log(row)

    def _listen(self) -> int | None:
        """Reads events; returns the step that the ranks went back to, None where they did not."""
        back = None
        for row in self._events.read_new():
            if row["event"] == "resume":
                self._resumes.append(row)
                back = row["step"]
            elif row["event"] == "phase" and row["name"] == "train":
                self._trains = self._trains or row["time"] >= self._since
        return back

    def _tell(self, notice: str = "", *, state: str = "") -> None:
        self.state.state = state or self.state.state
        if notice:
            self.state.notices.append(notice)
        try:
            write_tracker_state(self._files.wandb, self.state)
        except OSError as error:  # a full disk; the log says it
            sys.stderr.write(f"{self._files.wandb}: {error}; {notice}\n")


def main(root: Path, *, mode: str, since: float) -> int:
    """Sends the run in ``root`` until it has ended; returns the exit code."""
    os.dup2(2, 1)  # nobody reads what wandb prints: it goes to the log
    files = RunFiles(root.resolve())
    os.chdir(root)  # wandb trusts a `wandb/settings` beside it, the address of the service included
    from fsdpq.launch.tracking.wandb_run import WandbRun, end_service

    recipe = load_resolved(files.resolved)

    def open_run(run_id: str, mode: str) -> WandbRun:
        return WandbRun(files, recipe, run_id=run_id, mode=mode)

    tracking = Tracking(files, open_run, mode=mode, since=since)
    try:
        tracking.send(Outcome())
    except Exception as error:  # the run is not ours to end: whatever it is, the user is told
        tracking.fail(error)
        raise
    finally:
        end_service()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), mode=sys.argv[2], since=float(sys.argv[3])))
