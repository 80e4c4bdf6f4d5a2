"""The first machine of several: who takes part, when ranks start, why they end.

Its launcher listens at ``launch.rdzv_endpoint``. It makes the run directory, shows the progress and
decides about restarts; the others (`fsdpq.launch.nodes.member`) do as they are told and tell how
their ranks are. torchrun is started anew each time by every launcher, with fixed places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fsdpq.errors import ExitCode, FsdpqError, LaunchError
from fsdpq.launch.nodes.address import Endpoint, free_port, network_environment
from fsdpq.launch.nodes.ends import hang_from_json, own_part
from fsdpq.launch.nodes.facts import NodeFacts, describe_inputs
from fsdpq.launch.nodes.line import Line
from fsdpq.launch.nodes.node import Node, read_message
from fsdpq.launch.ranks.failure import RanksEnd
from fsdpq.launch.ranks.torchrun import Place
from fsdpq.launch.ranks.watch import Hang, HangWatch, explain_hang
from fsdpq.launch.screen import Screen
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.run_files.paths import RunFiles

LAST_CALL_S = 30.0
"""A range of machines waits so long for more than its least, as torchrun does."""
END_S = 10.0
"""Time that ranks of other machines get to end after the first one that failed."""

_POLL_S = 0.05


class RanksEndedElsewhereError(LaunchError):
    """Ranks of another machine failed while those of this one go on."""


class First:
    """The first machine of a run, for its own launcher.

    Args:
        listener: a socket that listens at the endpoint.
        endpoint: where it is.
        facts: of this machine.
        launch: resolved options.
        screen: shows who comes and goes.

    Attributes:
        wish: name of the signal by which another machine asked for an end, or empty.
        insists: whether it asked again.
    """

    def __init__(
        self,
        listener: socket.socket,
        endpoint: Endpoint,
        facts: NodeFacts,
        launch: LaunchOptions,
        screen: Screen,
    ) -> None:
        self.wish = ""
        self.insists = False
        self.facts = facts
        self._endpoint, self._launch, self._screen = endpoint, launch, screen
        self._listener = listener
        self._arrived: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._nodes: list[Node] = []
        self._turned_away: list[str] = []
        self._inputs: dict[str, Any] | None = None
        self._files: RunFiles | None = None
        self._token = secrets.token_hex(8)
        self._failed_since: float | None = None
        self._ends: list[RanksEnd] = []
        threading.Thread(target=self._accept, daemon=True, name="accept-launchers").start()

    # Who takes part.

    def gather(self) -> None:
        """Waits until the machines are here: all, or of a range the least and a while longer.

        Raises:
            LaunchError: some did not come in time.
        """
        least, most = self._launch.min_nodes, self._launch.max_nodes
        wanted = most if least == most else f"{least} to {most}"
        self._screen.report(
            f"waiting for the other machines, {wanted} in all, at {self._endpoint.text}"
        )
        began = last = time.monotonic()
        count = 0
        while (joined := len(self._nodes_here()) + 1) < most:
            now = time.monotonic()
            last, count = (now, joined) if joined != count else (last, count)
            if joined >= least and now - last > LAST_CALL_S:
                break
            if joined < least and now - began > self._launch.join_timeout_s:
                raise self._missing(joined)
            time.sleep(_POLL_S)
            self.poll()
        names = ", ".join([self.facts.name, *(node.name for node in self._nodes_here())])
        self._screen.report(f"{_machines(joined)}: {names}")

    def describe(self) -> list[dict[str, Any]]:
        """Returns what the lock keeps of every machine."""
        here = [self.facts, *(node.facts for node in self._nodes_here() if node.facts)]
        return [
            {"host": facts.host, "address": facts.address, "hardware": facts.hardware}
            for facts in here
        ]

    def take_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Takes the inputs of this machine, which those of the others are compared with."""
        self._inputs = describe_inputs(inputs)
        self.poll()

    def share(self, files: RunFiles) -> None:
        """Tells the others the run directory, which they must see."""
        files.meeting(self._token).write_text(self._token)
        self._files = files
        self.poll()

    # One start of the ranks.

    def start(self, *, resumes: bool) -> Place:
        """Waits until enough machines are ready, and starts the ranks of the others.

        Args:
            resumes: whether they go on from the newest checkpoint.

        Returns:
            The place of this machine.

        Raises:
            LaunchError: some did not come in time.
        """
        ready = self._wait_ready()
        self._failed_since, self._ends = None, []
        self.wish, self.insists = "", False
        port = free_port(self._endpoint)
        numbers = _numbered(ready, most=self._launch.max_nodes)
        count = len(ready) + 1
        start = {"say": "start", "num_nodes": count, "port": port, "resumes": resumes}
        for number, node in numbers.items():
            node.begin(number)
            node.line.send(start | {"node": number})
        if count < self._launch.max_nodes:
            self._screen.report(f"starting on {_machines(count)} of {self._launch.max_nodes}")
        address = self._endpoint.address[0]
        own = ready[0].line.own_address if ready else address
        return Place(0, count, address, port, own, network_environment(own))

    def check(self, watch: HangWatch) -> None:
        """Looks once at the others, and at the ranks of this machine.

        Raises:
            RanksEndedElsewhereError: ranks of another machine failed some seconds ago.
            LaunchError: a machine is lost, or the ranks hang.
        """
        self.poll()
        for node in self._active():
            if node.line.lost and node.end is None:
                raise _lost(node)
        if any(node.failed for node in self._active()):
            now = time.monotonic()
            self._failed_since = self._failed_since or now
            if now - self._failed_since > END_S / 2:
                raise RanksEndedElsewhereError("ranks of another machine ended")
        own = watch.sees_hang()
        if own or any(node.hang for node in self._active()):
            raise self._explain_hang(watch)

    def finish(self, *, at_once: bool) -> list[RanksEnd]:
        """Ends the ranks of the other machines; returns how they ended.

        Args:
            at_once: do not let them end by themselves.
        """
        self._wait_for(lambda: not self._working() or self.insists, 0.0 if at_once else END_S / 2)
        for node in self._working():
            node.line.send({"say": "halt"})
        self._wait_for(lambda: not self._working(), END_S)
        ends = [
            dataclasses.replace(node.end, on=f" on {node.name}")
            for node in self._active()
            if node.end is not None
        ]
        for node in self._active():
            node.number = 0
        self._nodes = [node for node in self._nodes if not node.line.lost]
        self._ends = ends
        return ends

    @property
    def ends(self) -> list[RanksEnd]:
        """How the ranks of other machines ended when they last did."""
        return self._ends

    def own_end(self, end: RanksEnd) -> RanksEnd:
        """Returns what this machine found, without what other machines wrote beside it."""
        ranks = range(int(self._launch.nproc_per_node))
        return dataclasses.replace(own_part(end, ranks, since=0.0), on=self.on)

    @property
    def on(self) -> str:
        """What messages say of this machine's ranks: `` on HOST``."""
        return f" on {self.facts.name}"

    def close(self, error: BaseException | None) -> None:
        """Tells the others how the run ended, and leaves.

        Args:
            error: what ended it early, if anything did.
        """
        end: dict[str, Any] = {"say": "end", "code": 0, "message": "", "hint": ""}
        if isinstance(error, FsdpqError):
            end |= {"code": int(error.exit_code), "message": error.message, "hint": error.hint}
        elif error is not None:
            words = "stopped" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            code = ExitCode.INTERRUPTED if words == "stopped" else ExitCode.RUN_FAILED
            end |= {"code": int(code), "message": f"the first machine ended: {words}"}
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        lines = [node.line for node in self._nodes]
        for line in lines:
            line.send(end)
        deadline = time.monotonic() + 2.0
        while not all(line.lost for line in lines) and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # they leave first, so that nothing that was sent is lost
        for line in lines:
            line.close()
        if self._files is not None:
            self._files.meeting(self._token).unlink(missing_ok=True)

    # What the others say.

    def poll(self) -> None:
        """Takes what the others said since the last look."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._nodes.append(Node(self._arrived.get_nowait()))
        for node in list(self._nodes):
            while (message := node.line.receive()) is not None:
                try:
                    self._take(node, message)
                except (KeyError, TypeError, ValueError):
                    node.line.lost = "it does not speak as a launcher of fsdpq does"
            self._advance(node)
            if node.line.lost and not node.number:
                self._nodes.remove(node)
                if node.facts is not None and not node.turned_away:
                    self._screen.report(f"{node.name} has left: {node.line.lost}")

    def _take(self, node: Node, message: dict[str, Any]) -> None:
        said = read_message(node, message)
        if said == "hello":
            self._welcome(node)
        elif said == "failed":
            self._part_from(node, message["message"], told=True)
        elif said == "signal":
            self.insists = self.insists or bool(message["insists"])
            self.wish = self.wish or str(message["name"])
        elif said == "hang":
            node.hang = hang_from_json(message["hang"])

    def _welcome(self, node: Node) -> None:
        others = [other for other in self._nodes_here() if other is not node]
        why = node.why_not(self.facts, others, most=self._launch.max_nodes)
        if why:
            self._part_from(node, why)
            return
        self._screen.report(f"{node.name} is here")
        node.line.send({"say": "prepare", "recipe": self.facts.recipe, "first": self.facts.name})

    def _advance(self, node: Node) -> None:
        """Tells a machine the next thing, where both sides have come so far."""
        if node.inputs is None or self._inputs is None or node.turned_away:
            return
        if not node.compared:
            node.compared = True
            if why := node.other_inputs(self.facts, self._inputs):
                self._part_from(node, why)
                return
        if self._files is not None and not node.told_run:
            node.told_run = True
            root = str(self._files.root.absolute())
            node.line.send({"say": "run", "run_dir": root, "token": self._token})

    def _part_from(self, node: Node, why: str, *, told: bool = False) -> None:
        if not told:
            node.line.send({"say": "turned away", "message": why})
        node.turned_away = True
        self._turned_away.append(f"{node.name}: {why}")
        self._screen.report(f"note: {node.name} does not take part: {why}")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._arrived.put(Line(connection, silence_s=self._launch.node_timeout_s))

    def _nodes_here(self) -> list[Node]:
        return [node for node in self._nodes if node.is_here]

    def _active(self) -> list[Node]:
        return [node for node in self._nodes if node.number]

    def _working(self) -> list[Node]:
        return [node for node in self._active() if node.end is None and not node.line.lost]

    def _wait_ready(self) -> list[Node]:
        least, most = self._launch.min_nodes, self._launch.max_nodes
        deadline, told = time.monotonic() + self._launch.join_timeout_s, False
        while True:
            self.poll()
            here = self._nodes_here()
            ready = [node for node in here if node.sees]
            if len(ready) + 1 >= most or (len(ready) == len(here) and len(ready) + 1 >= least):
                return ready[: most - 1]
            if len(ready) < len(here):  # one makes its data, or its base
                deadline = time.monotonic() + self._launch.join_timeout_s
            elif time.monotonic() > deadline:
                raise self._missing(len(ready) + 1)
            elif not told:
                told = True
                self._screen.report(f"waiting for {least - len(ready) - 1} more of the machines")
            time.sleep(_POLL_S)

    def _missing(self, there: int) -> LaunchError:
        least = self._launch.min_nodes
        names = ", ".join([self.facts.name, *(node.name for node in self._nodes_here())])
        message = f"{there} of {least} machines came within {self._launch.join_timeout_s:g} s: "
        message += names
        details = "\n".join(["these could not take part", *self._turned_away])
        return LaunchError(
            message,
            hint=f"start the same command on the others, which must reach {self._endpoint.text}; "
            "`launch.join_timeout_s` is how long it is waited for them",
            details=details if self._turned_away else "",
        )

    def _explain_hang(self, watch: HangWatch) -> LaunchError:
        for node in self._working():
            if node.hang is None:
                node.line.send({"say": "where"})
        own = watch.describe()
        self._wait_for(lambda: all(node.hang for node in self._working()), END_S)
        hangs: list[Hang] = [own]
        on = dict.fromkeys(own.beats, self.on)
        for node in self._active():
            if node.hang is not None:
                hangs.append(node.hang)
                on |= dict.fromkeys(node.hang.beats, f" on {node.name}")
        files = self._files or RunFiles(Path())
        return explain_hang(files, *hangs, on=on)

    def _wait_for(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self.poll()
        while not done() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.poll()


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _numbered(nodes: list[Node], *, most: int) -> dict[int, Node]:
    """Returns the machines by number: where all are there, each has the one that it was told."""
    told: dict[int, Node] = {}
    if len(nodes) + 1 == most:
        told = {node.told_rank: node for node in nodes if node.told_rank is not None}
    rest = [node for node in nodes if node not in told.values()]
    rest.sort(key=lambda node: node.told_rank or most)
    free = (number for number in range(1, most) if number not in told)
    return dict(sorted({**told, **dict(zip(free, rest, strict=False))}.items()))


def _lost(node: Node) -> LaunchError:
    message = f"{node.name}, machine {node.number} beside the first, is lost: {node.line.lost}"
    hint = "look at that machine; with `launch.max_restarts` the run goes on when it is back, and "
    hint += "with a range of `launch.nnodes` without it"
    return LaunchError(message, hint=hint)
