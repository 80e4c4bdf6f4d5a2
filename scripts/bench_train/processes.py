"""Contenders as processes: built once, told to do one step at a time."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from scripts.bench_train.shapes import Batch

RATE = "matmul"
"""The process that measures products; the others are named ``contender:dtype``."""


@dataclass(frozen=True)
class Limits:
    """What a process may use.

    Attributes:
        threads: of torch on the CPU.
        cap_gib: memory of the GPU, None for all of it.
    """

    threads: int
    cap_gib: float | None


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

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
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

    @property
    def step_s(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)

    @property
    def step_cpu_s(self) -> float:
        """The median step in seconds of the processor."""
        return statistics.median(self.cpu_seconds)


class ContenderProcess:
    """A process that holds one contender.

    Args:
        name: ``contender:dtype``, or `RATE`.
        options: `scripts.bench_train.contenders.Options`, its dtype aside.
        limits: of the process.
    """

    def __init__(self, name: str, options: Any, limits: Limits) -> None:
        os.environ["OMP_NUM_THREADS"] = str(limits.threads)
        os.environ["TQDM_DISABLE"] = "1"
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self.name = name
        self._process = context.Process(
            target=_serve, args=(theirs, name, options, limits), daemon=True
        )
        self._process.start()
        theirs.close()

    def step(self, batch: Batch) -> dict[str, Any]:
        """Does one step and returns what it took."""
        self._ours.send(batch)
        return self._receive()

    def wait_until_built(self) -> dict[str, Any]:
        """Returns ``loaded_bytes``, resident on the host."""
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()
        self._process.join(timeout=30)
        self._process.kill()

    def _receive(self) -> dict[str, Any]:
        try:
            return self._ours.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"{self.name} ended with {self._process.exitcode}") from None


def measure_together(
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    rounds_of: Callable[[Batch], int],
    options: Any,
    limits: Limits,
) -> dict[tuple[str, Batch], Found]:
    """Returns what was measured of every name and batch; the names take turns, step by step."""
    processes: list[ContenderProcess] = []
    found = {(name, batch): Found() for name in names for batch in batches}
    try:
        for name in names:  # one after the other: loading needs all cores too
            processes.append(ContenderProcess(name, options, limits))
            loaded = processes[-1].wait_until_built()
            print(f"{name}: {loaded['loaded_bytes'] / 1e6:.0f} MB on the host", flush=True)
        for batch in batches:
            for index in range(rounds_of(batch) + 1):
                for process in processes:
                    answer = process.step(batch)
                    found[process.name, batch].add(answer, first=index == 0)
    finally:
        for process in processes:
            process.close()
    return found


def _serve(connection: Connection, name: str, options: Any, limits: Limits) -> None:
    import torch

    from fsdpq.metrics.peaks import peaks, reset_peaks, status_bytes, synchronize

    warnings.simplefilter("ignore")
    torch.set_num_threads(limits.threads)
    device = torch.device(options.device)
    if limits.cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limits.cap_gib * 2**30 / total)
    run = _build(name, options)
    gc.collect()
    connection.send({"loaded_bytes": status_bytes("VmRSS")})
    last: Batch | None = None
    while True:
        try:
            batch: Batch = connection.recv()
        except EOFError:
            return
        if batch != last:
            reset_peaks(device)
            last = batch
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = run(batch)
        synchronize(device)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        timed = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}
        connection.send(timed | peaks(device))


def _build(name: str, options: Any) -> Callable[[Batch], float]:
    import dataclasses

    from scripts.bench_train import contenders
    from scripts.bench_train.measure import MatmulRate

    contender, _, dtype = name.partition(":")
    if contender == RATE:
        rate = MatmulRate(options.shape, contenders.DTYPES[dtype], options.device)
        return rate.flops_per_s
    return contenders.build(contender, dataclasses.replace(options, dtype=dtype))
