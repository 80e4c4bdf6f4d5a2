"""Starting a process of our own and ending it with everything it started.

torchrun puts every rank into a session of its own, so a signal to a process group does not reach
the ranks: they are found as descendants, noted while they live, and ended one by one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from fsdpq.errors import LaunchError
from fsdpq.launch.machine.devices import count_cores

GRACE_S = 10.0
"""Time that a stopped run gets to end by itself."""

LAUNCHER_PID = "FSDPQ_LAUNCHER_PID"
"""Environment variable with the launcher's process id; a worker whose launcher is gone ends."""

TRUST_FLAG = "--trust-remote-code"
"""Argument of the worker that lets it run Python code that the model brings."""

RESUME_FLAG = "--resume"
"""Argument of the worker that lets it go on from the newest whole checkpoint of its run."""

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
"""Environment variables that a rank has no use for: it never asks the hub."""

TRACKER_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
"""Of Weights & Biases, which no rank knows of: `fsdpq.launch.tracking` sends what ranks write."""

_NOTE_INTERVAL_S = 0.5

REPEAT_S = 0.3
"""A signal this soon after another one is no second wish."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What asks for an end. Slurm sends SIGUSR1 before a job's time is over, where it is told to."""

BLOCKED_IN_RANKS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
"""Slurm sends these to every process of a job: torchrun must not die of them, nor end its ranks. A
blocked signal stays blocked in whatever a process starts; a rank picks its own up by itself
(`fsdpq.worker.keeping.signals`). torchrun's handler of SIGHUP stays."""


@dataclass
class StopSignals:
    """The signals that asked for an end, in order."""

    received: list[int] = field(default_factory=list[int])
    times: list[float] = field(default_factory=list[float])

    def note(self, number: int) -> None:
        """Takes one signal."""
        self.received.append(number)
        self.times.append(time.monotonic())

    @property
    def insists(self) -> bool:
        """Whether somebody asked again: Ctrl-C, or the first signal once more.

        What comes at the same moment is the same wish, on another way; and Slurm sends SIGTERM some
        time after SIGUSR1 or after a first SIGTERM, to a job that may be saving still.
        """
        again = {int(signal.SIGINT)}
        if "SLURM_JOB_ID" not in os.environ:
            again |= set(self.received[:1])
        return any(
            time_s - self.times[0] > REPEAT_S and number in again
            for number, time_s in zip(self.received, self.times, strict=True)
        )

    @property
    def name(self) -> str:
        """Name of the first one, ``SIGINT``."""
        return signal.Signals(self.received[0]).name if self.received else ""


@contextmanager
def catch_stop_signals() -> Generator[StopSignals, None, None]:
    """Notes `STOP_SIGNALS` instead of dying of them, until the block ends.

    One that is ignored stays so: ``nohup`` ignores SIGHUP.
    """
    stop = StopSignals()

    def note(number: int, _frame: FrameType | None) -> None:
        stop.note(number)

    heeded = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProcessTree:
    """A process in a session of its own, and everything that it starts.

    Args:
        command: program and arguments.
        environment: its whole environment.
        stdout: file that its standard output goes to; its standard error too without ``stderr``.
            None makes pipes of its standard input and output.
        stderr: file that its standard error goes to.
        blocked: signals that it and what it starts never receive, unless they wait for them.
        appends: its output goes to the end of ``stdout``, which is emptied otherwise.

    Attributes:
        input: what the process reads, where it has pipes.
        output: what it writes, where it has pipes.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        stdout: Path | None,
        stderr: Path | None = None,
        blocked: frozenset[signal.Signals] = frozenset(),
        appends: bool = False,
    ) -> None:
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._next_note = 0.0
        with ExitStack() as files:
            mode = "ab" if appends else "wb"
            out = subprocess.PIPE if stdout is None else files.enter_context(stdout.open(mode))
            errors = stderr or stdout
            err = None if errors is None else files.enter_context(errors.open("ab"))
            # A child has the mask of its parent. What arrives here meanwhile is delivered after.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=err, start_new_session=True,
                    stdin=subprocess.PIPE if stdout is None else subprocess.DEVNULL,
                    close_fds=True,
                )  # fmt: skip
            except OSError as error:
                message = f"`{command[0]}` cannot be started: {error.strerror}"
                raise LaunchError(message, hint="check the Python installation") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.input, self.output = self._process.stdin, self._process.stdout

    def poll(self) -> int | None:
        """Returns the exit code, None while the process runs; notes its descendants."""
        if time.monotonic() >= self._next_note:
            self._note_descendants(of=[self._process.pid])
            self._next_note = time.monotonic() + _NOTE_INTERVAL_S
        return self._process.poll()

    def wait(self, stop: StopSignals, *, timeout_s: float) -> int | None:
        """Waits for the end, a stop signal or the timeout; returns the exit code if it ended."""
        known = len(stop.received)
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None and time.monotonic() < deadline:
            if len(stop.received) > known:
                break
            time.sleep(0.05)
        return code

    def wait_end(self, timeout_s: float) -> int | None:
        """Waits for the end; returns the exit code, None after the timeout."""
        return self.wait(StopSignals(), timeout_s=timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone, where it is there."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, stop: StopSignals) -> None:
        """Asks for an end by SIGTERM, and ends everything after `GRACE_S` or a second signal."""
        self._note_descendants(of=[self._process.pid])
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            if len(stop.received) < 2:
                self.wait(stop, timeout_s=GRACE_S)
        self.kill()

    def kill(self) -> None:
        """Ends the process and every descendant that is left, at once."""
        self._note_descendants(of=[self._process.pid, *(pid for pid, _ in self._seen)])
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        left = [process for process in self._seen.values() if process.is_running()]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)

    def _note_descendants(self, *, of: list[int]) -> None:
        for pid in of:
            try:
                for child in psutil.Process(pid).children(recursive=True):
                    self._seen[child.pid, child.create_time()] = child
            except psutil.Error:
                continue


ONEDNN_PRIMITIVES = "64"
"""Products that oneDNN keeps compiled, on CPUs. Every new number of tokens needs some; its own 1024
took 200 MiB more in 24 steps over rows of many lengths, for no speed."""


def worker_environment(*, num_ranks: int, network: bool = False) -> dict[str, str]:
    """Returns the environment of the workers: no network, no tokens, threads shared out.

    With ``network`` the hub may be asked, with the user's token.

    torchrun would give every rank one thread. On a GPU too the host computes: the optimizer's step
    under ``fsdp.offload``, which is bound by how fast memory is read, and casts while loading.
    """
    kept_away = TRACKER_KEYS if network else (*HUB_TOKENS, *TRACKER_KEYS)
    environment = {name: value for name, value in os.environ.items() if name not in kept_away}
    environment.update(
        {
            LAUNCHER_PID: str(os.getpid()),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
    )
    if not network:
        environment["HF_HUB_OFFLINE"] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // num_ranks)))
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRIMITIVES)
    return environment
