"""The real worker, run by torchrun, of which one rank does what ``MISBEHAVE`` says.

``MISBEHAVE`` is ``MODE:RANK:STEP``. Nothing in the product knows of it.
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any


def spin() -> None:
    while True:
        pass


def hold_the_gil() -> None:
    """Waits in C for a lock that this thread has already, without giving the GIL back."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait() -> None:
    """Says that the step has come, and goes on when it is told to."""
    Path(os.environ["MISBEHAVE_HERE"]).touch()
    while not Path(os.environ["MISBEHAVE_GO"]).exists():
        time.sleep(0.02)


MODES = {"spin": spin, "gil": hold_the_gil, "stopped": be_stopped, "wait": wait}


def misbehave() -> None:
    """Replaces what a step is on the rank that is meant."""
    from fsdpq.training import loop

    mode, rank, at_step = os.environ["MISBEHAVE"].split(":")
    if os.environ["RANK"] != rank:
        return
    original, num_calls = loop.train_step, 0

    def train_step(*arguments: Any, **named: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == int(at_step):
            MODES[mode]()
        return original(*arguments, **named)

    loop.train_step = train_step  # type: ignore[assignment]


if __name__ == "__main__":
    from fsdpq.worker.__main__ import main

    if os.environ.get("MISBEHAVE"):
        misbehave()
    main()
