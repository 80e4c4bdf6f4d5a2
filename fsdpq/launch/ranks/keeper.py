"""What the launcher does for a run while its ranks work: asks them to save, sees when they hang."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.run_files import RunFiles

SAVING = "saving after this step; press Ctrl-C again to end at once"
FINISHING = "what is trained is written already or being written; press Ctrl-C again to end at once"


class RunKeeper:
    """Keeps one training run: give it the rows of the ranks, and ask it while they run.

    Args:
        files: the run directory.
        watch: sees when the ranks hang.
        report: told one line when the ranks are asked to end.
    """

    def __init__(self, files: RunFiles, watch: HangWatch, report: Callable[[str], Any]) -> None:
        self._files = files
        self._watch = watch
        self._report = report
        self._phase = ""
        self._trains = False
        self._asked = False
        files.stop_request.unlink(missing_ok=True)

    def take(self, row: dict[str, Any]) -> None:
        """Takes one row of events."""
        if row.get("event") == "phase":
            self._phase = row["name"]
            self._trains = self._trains or self._phase == "train"

    def check(self) -> None:
        """Raises LaunchError where the ranks hang."""
        self._watch.check()

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
