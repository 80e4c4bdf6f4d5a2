"""Contenders as processes: built once, told to do one step at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from fsdpq.errors import LaunchError
from fsdpq.metrics.peaks import peaks, reset_peaks, synchronize
from fsdpq.worker.bench.children import QUIET
from fsdpq.worker.bench.contenders import OURS, RATE, ContenderOptions, build_contender
from fsdpq.worker.bench.shapes import Batch

Tell = Callable[[str], None]


@dataclass
class Found:
    """What was measured of one contender and batch.

    Attributes:
        seconds: of each step but the first.
        cpu_seconds: of the processor, all threads together.
        losses: of each step, the first too.
        peak_bytes: on the device.
        host_bytes: of the process on the host.
    """

    seconds: list[float] = field(default_factory=list[float])
    cpu_seconds: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])
    peak_bytes: int = 0
    host_bytes: int = 0

    def add(self, answer: dict[str, Any], *, first: bool) -> None:
        """Takes the answer of one step."""
        self.losses.append(answer["loss"])
        if not first:
            self.seconds.append(answer["seconds"])
            self.cpu_seconds.append(answer["cpu_seconds"])
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        self.host_bytes = max(self.host_bytes, answer["host_bytes"])


Measured = dict[tuple[str, Batch], Found]
"""By ``contender:dtype`` and batch."""


@dataclass(frozen=True)
class Rounds:
    """What is measured of every contender.

    Attributes:
        batches: in this order.
        count_for: timed steps of a batch; one before them is not timed.
    """

    batches: Sequence[Batch]
    count_for: Callable[[Batch], int]


class OutOfMemoryHere(Exception):  # noqa: N818
    """A contender of others needs more memory than the device has."""


class ContenderProcess:
    """A process that holds one contender.

    Args:
        name: ``contender:dtype``.
        options: of the model, the dtype aside.
        threads: of torch on the CPU.
    """

    def __init__(self, name: str, options: ContenderOptions, threads: int) -> None:
        os.environ |= QUIET | {"OMP_NUM_THREADS": str(threads)}
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self.name = name
        self._process = context.Process(
            target=_serve, args=(theirs, name, options, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def step(self, batch: Batch) -> dict[str, Any]:
        """Does one step and returns what it took.

        Raises:
            OutOfMemoryHere: it does not fit.
            LaunchError: the process failed.
        """
        self._ours.send(batch)
        return self._receive()

    def wait_until_built(self) -> None:
        """Waits until it can take steps; raises as `step`."""
        self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()
        self._process.join(timeout=30)
        self._process.kill()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._ours.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise LaunchError(f"the process of {self.name} ended with {code}") from None
        if answer.get("out_of_memory") and self.name.partition(":")[0] != OURS:
            raise OutOfMemoryHere(self.name)
        if "error" in answer:
            raise LaunchError(f"{self.name}: {answer['error']}", "try a smaller `step.batches`")
        return answer


class RateHere:
    """The rate of products, measured in this process: as a contender, without its own imports.

    Args:
        name: `RATE` and a dtype.
        options: of the model, on the CPU.
        threads: of torch.
    """

    def __init__(self, name: str, options: ContenderOptions, threads: int) -> None:
        self.name = name
        self._threads = threads
        dtype = name.partition(":")[2]
        self._run = build_contender(RATE, dataclasses.replace(options, dtype=dtype))

    def wait_until_built(self) -> None:
        """It is."""

    def step(self, batch: Batch) -> dict[str, Any]:
        """Measures once; the losses are operations a second."""
        torch.set_num_threads(self._threads)
        device = torch.device("cpu")
        return _timed_step(self._run, batch, device) | {"peak_bytes": 0, "host_bytes": 0}

    def close(self) -> None:
        """Nothing is left to end."""


def measure_together(
    names: Sequence[str], rounds: Rounds, *, options: ContenderOptions, threads: int, tell: Tell
) -> Measured:
    """Returns what was measured of every name; the names take turns, step by step.

    A contender of others that runs out of memory is left out from there on.
    """
    running: list[ContenderProcess | RateHere] = []
    found: Measured = {(name, batch): Found() for name in names for batch in rounds.batches}
    try:
        for name in names:  # one after the other: loading needs all cores too
            tell(f"building {name}")
            here = name.startswith(f"{RATE}:") and options.device == "cpu"
            kind = RateHere if here else ContenderProcess
            running.append(kind(name, options, threads))
            with _left_out(running, running[-1], tell):
                running[-1].wait_until_built()
        for batch in rounds.batches:
            for index in range(rounds.count_for(batch) + 1):
                tell(f"{batch}: step {index} of {rounds.count_for(batch)}")
                for process in list(running):
                    with _left_out(running, process, tell):
                        found[process.name, batch].add(process.step(batch), first=index == 0)
    finally:
        for process in running:
            process.close()
    return found


@contextlib.contextmanager
def _left_out(
    running: list[ContenderProcess | RateHere],
    process: ContenderProcess | RateHere,
    tell: Tell,
) -> Iterator[None]:
    """Takes a process that ran out of memory out of those that run."""
    try:
        yield
    except OutOfMemoryHere:
        tell(f"{process.name} is out of memory and is left out")
        running.remove(process)
        process.close()


def _serve(connection: Connection, name: str, options: ContenderOptions, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    contender, _, dtype = name.partition(":")
    try:
        run = build_contender(contender, dataclasses.replace(options, dtype=dtype))
        gc.collect()
        connection.send({"built": True})
        last: Batch | None = None
        while True:
            batch: Batch = connection.recv()
            if batch != last:
                reset_peaks(device)
                last = batch
            timed = _timed_step(run, batch, device)
            connection.send(timed | peaks(device))
    except EOFError:
        return
    except Exception as error:
        no_memory = isinstance(error, torch.OutOfMemoryError)
        text = f"{type(error).__name__}: {error}"
        connection.send({"error": text, "out_of_memory": no_memory})
        raise


def _timed_step(
    run: Callable[[Batch], float], batch: Batch, device: torch.device
) -> dict[str, float]:
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = run(batch)
    synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}


def contender_names(contenders: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    """Returns the processes: every contender in every dtype, and the rates.

    In fp32 ``prepare_model_for_kbit_training`` has nothing to cast: one of the two is enough.
    """
    names = [
        f"{contender}:{dtype}"
        for dtype in dtypes
        for contender in contenders
        if not ("unprepared" in contender and dtype == "fp32")
    ]
    return names + [f"{RATE}:{dtype}" for dtype in dtypes]
