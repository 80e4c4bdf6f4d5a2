"""Running the ranks under torchrun and following what rank 0 writes.

On one machine without an endpoint torchrun finds a free port on the loopback device. A given port
is used as it is, by static rendezvous, because c10d rendezvous waits for ever on a port where
something else answers (torch 2.13). Several machines are static too: their launchers have agreed
before who is who (`fsdpq.launch.nodes`), and start again together.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.ranks.processes import (
    BLOCKED_IN_RANKS,
    ProcessTree,
    StopSignals,
    catch_stop_signals,
    worker_environment,
)
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.run_files.paths import RunFiles

POLL_S = 0.1
WORKER = ("-m", "fsdpq.worker", "train")

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the ranks of this machine stand among those of all.

    Attributes:
        node: number of this machine, counted from 0.
        num_nodes: machines that start.
        address: of the first machine.
        port: there, where the ranks meet.
        own_address: of this machine.
        environment: more variables for the ranks.
    """

    node: int
    num_nodes: int
    address: str
    port: int
    own_address: str
    environment: Mapping[str, str]

    def arguments(self) -> list[str]:
        """Returns torchrun's."""
        return [
            f"--nnodes={self.num_nodes}", f"--node-rank={self.node}",
            f"--master-addr={self.address}", f"--master-port={self.port}",
            f"--local-addr={self.own_address}",
        ]  # fmt: skip


class Keeper(Protocol):
    """What a launcher does while the ranks work: `fsdpq.launch.ranks.keeper` has one."""

    def check(self) -> None:
        """Looks once; raises where the ranks are to be ended at once."""
        ...

    def asked(self, stop: StopSignals) -> tuple[str, bool]:
        """Returns the signal that asks for an end, and whether somebody insists."""
        ...

    def ask_to_end(self, signal_name: str) -> bool:
        """Asks the ranks to save and end; returns False where they are to be ended at once."""
        ...


class JsonLinesTail:
    """Reads what is appended to a file of JSON lines; a line counts once its newline is there.

    What is in the file already belongs to an earlier start of the ranks, and is left out.

    Args:
        path: of the file, which may be missing still.
        from_start: give what is in it, too.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() and not from_start else 0

    def read_new(self) -> Iterator[Row]:
        """Yields the rows that were completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(max(0, self._position - 1))
            if self._position and file.read(1) != b"\n":
                self._position = 0  # another file: the directory was removed, or mounted anew
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                yield json.loads(line)


def run_torchrun(
    files: RunFiles,
    launch: LaunchOptions,
    *,
    on_row: Callable[[Row], None],
    worker: Sequence[str] = WORKER,
    keeper: Keeper | None = None,
    place: Place | None = None,
) -> tuple[int, str]:
    """Runs the ranks to their end, giving ``on_row`` every row of metrics and events.

    Whatever happens, no process that was started here outlives the call.

    Args:
        files: the run directory.
        launch: resolved options.
        on_row: called about ten times a second at most with what is new, in order of each file.
        worker: arguments of torchrun that name the worker; the run directory follows.
        keeper: asks the ranks to save where a signal comes; without one they end at once.
        place: of this machine where there are others; None is one machine, whatever the recipe.

    Returns:
        torchrun's exit code, and the name of the signal for which the ranks were ended or "". Where
        they were asked to save they end by themselves, and there is no name.

    Raises:
        LaunchError: the ranks hang.
    """
    num_ranks = int(launch.nproc_per_node)
    environment = worker_environment(num_ranks=num_ranks)
    environment |= {} if place is None else dict(place.environment)
    endpoint = launch.rdzv_endpoint if launch.max_nodes == 1 else None
    where = _rendezvous(endpoint) if place is None else place.arguments()
    command = [*_torchrun(num_ranks), *where, *worker, str(files.root)]
    log = files.node_torchrun_log(0 if place is None else place.node)
    has_rank_0 = place is None or place.node == 0
    tails = [JsonLinesTail(path) for path in (files.events, files.metrics) if has_rank_0]
    stopped_by = ""
    with catch_stop_signals() as stop:
        tree = ProcessTree(
            command,
            environment=environment,
            stdout=log,
            blocked=BLOCKED_IN_RANKS,
        )
        try:
            while (code := tree.poll()) is None and not (stopped_by := _ended_by(stop, keeper)):
                _pass_on(tails, on_row)
                if keeper is not None:
                    keeper.check()
                time.sleep(POLL_S)
        finally:
            tree.kill()
    _pass_on(tails, on_row)
    return (code or 0), stopped_by


def _ended_by(stop: StopSignals, keeper: Keeper | None) -> str:
    """Returns the signal for which the ranks are to be ended now, not by themselves; or nothing."""
    name, insists = (stop.name, stop.insists) if keeper is None else keeper.asked(stop)
    if not name:
        return ""
    at_once = insists or keeper is None or not keeper.ask_to_end(name)
    return name if at_once else ""


def _torchrun(num_ranks: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run",
        f"--nproc-per-node={num_ranks}", "--signals-to-handle=SIGHUP",
    ]  # fmt: skip


def _pass_on(tails: list[JsonLinesTail], on_row: Callable[[Row], None]) -> None:
    rows = [row for tail in tails for row in tail.read_new()]
    for row in sorted(rows, key=lambda row: row.get("time", 0.0)):
        on_row(row)


def _rendezvous(endpoint: str | None) -> list[str]:
    if endpoint is None:
        return [
            "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
        ]  # fmt: skip
    host, _, port = endpoint.rpartition(":")
    return ["--nnodes=1", f"--master-addr={host}", f"--master-port={port}"]


def check_endpoint(launch: LaunchOptions) -> None:
    """Raises EnvironmentProblemError where ``launch.rdzv_endpoint`` cannot be listened on."""
    if launch.rdzv_endpoint is None or launch.max_nodes > 1:
        return  # the launchers of several machines meet there
    host, _, port_text = launch.rdzv_endpoint.rpartition(":")
    port = int(port_text)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        message = f"`launch.rdzv_endpoint`: the host `{host}` is not known"
        raise EnvironmentProblemError(message, hint="use `127.0.0.1`, or delete it") from None
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            message = f"`launch.rdzv_endpoint`: {host}:{port} cannot be used: {error.strerror}"
            hint = "choose another port, or delete it: a free port is found by itself"
            raise EnvironmentProblemError(message, hint=hint) from None
