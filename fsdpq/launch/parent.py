"""A launcher that was started by another one of ours, and does not outlive it.

``fsdpq sweep`` starts each trial as a ``fsdpq train`` of its own. Killed, it has no time to stop
them, so each looks after its parent itself: once that is gone it does what SIGTERM asks for, saves
and ends.
"""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_PID = "FSDPQ_PARENT_PID"
"""Environment variable with the process id of the launcher that started this one."""

POLL_S = 0.25


def end_with_parent() -> None:
    """Sends SIGTERM to this process soon after the parent that the environment names is gone.

    Does nothing where it names none. A parent that nobody has waited for yet is gone too, which is
    why its number is compared and not looked up.
    """
    parent = os.environ.pop(PARENT_PID, "")  # of this process: what it starts has another
    if not parent.isdigit():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
