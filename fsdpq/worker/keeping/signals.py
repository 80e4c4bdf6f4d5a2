"""Signals that a rank gets, noted without a signal handler.

Python runs handlers in the main thread between two of its instructions: never, while that thread
waits for a peer that is gone. Here the signals are blocked, in this thread before it starts others,
and a thread of its own waits for them. It also learns who sent one: torchrun ends the ranks by
SIGTERM once one of them has failed, and that is no wish to save.

SIGUSR2 makes the interpreter write where every thread is, also while C code holds the GIL.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from pathlib import Path

from fsdpq.errors import ExitCode

SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})

_received: list[str] = []


def note_signals() -> None:
    """Notes `SIGNALS` from here on; call it before any other thread runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait, daemon=True, name="note-signals").start()


def received_signal() -> str:
    """Returns the name of the first signal that asked this rank to end, empty without one."""
    return _received[0] if _received else ""


def _wait() -> None:
    parent = os.getppid()
    while True:
        number, sender = _next_signal()
        if number == signal.SIGTERM and sender == parent:
            os._exit(ExitCode.RUN_FAILED)  # another rank failed, and torchrun ends this one
        _received.append(signal.Signals(number).name)


def _next_signal() -> tuple[int, int]:
    """Waits for a signal; returns its number and who sent it, 0 where the system does not tell."""
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: torchrun's kill follows after 30 s there
        found = signal.sigwaitinfo(SIGNALS)
        return found.si_signo, found.si_pid
    return signal.sigwait(SIGNALS), 0


def tell_stack_on_request(path: Path) -> None:
    """Lets SIGUSR2 append the stacks of all threads to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb")  # stays open: there may be no way to open one later
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
