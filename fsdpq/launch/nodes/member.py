"""A machine beside the first one: prepares its inputs, runs its ranks, and tells how they are.

Its launcher decides nothing: `fsdpq.launch.nodes.first` does. Where the first machine is lost its
ranks end, and with ``launch.max_restarts`` it waits for the first machine to come back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fsdpq.errors import (
    EnvironmentProblemError,
    ExitCode,
    FsdpqError,
    LaunchError,
    RunSavedError,
    RunStoppedError,
    UsageError,
)
from fsdpq.launch.inputs.base_cache import held_inputs, remove_damaged_base
from fsdpq.launch.nodes.address import Endpoint, network_environment, own_address
from fsdpq.launch.nodes.ends import end_as_json, hang_as_json, own_part
from fsdpq.launch.nodes.facts import describe_inputs, facts_of
from fsdpq.launch.nodes.line import Line, Message
from fsdpq.launch.ranks.failure import RanksEnd, count_oom_kills, read_end
from fsdpq.launch.ranks.processes import RESUME_FLAG, StopSignals
from fsdpq.launch.ranks.torchrun import Place, run_torchrun
from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.launch.ready import Settled, gather_inputs
from fsdpq.launch.screen import Screen
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

INPUTS_FLAG = "--inputs"
"""Argument of the worker: where this machine has model, rows and base."""

SEE_S = 20.0
"""A directory across a network may show a new file so much later."""

_POLL_S = 0.2


class FirstLostError(LaunchError):
    """The first machine is gone."""


class _HaltedError(Exception):
    """The first machine wants the ranks to end now."""


@dataclasses.dataclass(frozen=True)
class Part:
    """How this machine takes part.

    Attributes:
        settled: what is to run, as this machine has it.
        endpoint: where the first machine listens.
        node_rank: the place that the user gave it.
        run_dir: where the user says that the run directory is; None is where the first has it.
        worker: arguments of torchrun that name the worker.
        screen: shows what happens.
    """

    settled: Settled
    endpoint: Endpoint
    node_rank: int | None
    run_dir: Path | None
    worker: Sequence[str]
    screen: Screen


def take_part(part: Part) -> RunFiles:
    """Takes part in a run until it ends; returns its directory.

    Raises:
        FsdpqError: how the run ended, as the first machine tells it; or the first one is lost.
    """
    launch = part.settled.recipe.launch
    for number in range(launch.max_restarts + 1):
        try:
            return Member(part, connect(part)).serve()
        except FirstLostError as error:
            if number == launch.max_restarts:
                raise
            part.screen.report(f"{error.message}: waiting for it to come back")
    raise AssertionError("the loop returns or raises")


def connect(part: Part) -> Line:
    """Returns a connection to the first machine; waits for it.

    Raises:
        LaunchError: it did not come in time.
    """
    launch, endpoint = part.settled.recipe.launch, part.endpoint
    deadline, told = time.monotonic() + launch.join_timeout_s, False
    while True:
        try:
            connection = socket.create_connection(endpoint.address[:2], timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                message = f"no first machine listens at {endpoint.text}: {error.strerror or error}"
                hint = "start the same command on the machine that has this address"
                raise LaunchError(message, hint=hint) from None
            if not told:
                told = True
                part.screen.report(f"waiting for the first machine at {endpoint.text}")
            time.sleep(_POLL_S)
        else:
            return Line(connection, silence_s=launch.node_timeout_s)


class Member:
    """This machine in one meeting.

    Args:
        part: how it takes part.
        line: to the first machine.
    """

    def __init__(self, part: Part, line: Line) -> None:
        self._part, self._line = part, line
        self._settled, self._screen = part.settled, part.screen
        self._address = own_address(part.endpoint)
        self._inputs: dict[str, Any] = {}
        self._files: RunFiles | None = None

    def serve(self) -> RunFiles:
        """Does what the first machine says, until the run ends.

        Raises:
            FsdpqError: see `take_part`.
        """
        facts = facts_of(
            self._settled,
            address=self._address,
            process=os.getpid(),
            node_rank=self._part.node_rank,
        )
        self._line.send({"say": "hello", "facts": facts.as_json()})
        steps: dict[str, Callable[[Message], None]] = {
            "prepare": self._prepare,
            "run": self._see,
        }
        try:
            while True:
                message = self._next()
                if message["say"] == "start":
                    self._run_ranks(message)
                elif message["say"] in steps:
                    self._or_tell(steps[message["say"]], message)
                elif message["say"] == "end":
                    return self._end(message)
                elif message["say"] == "turned away":
                    raise UsageError(
                        f"this machine cannot take part: {message['message']}",
                        hint="make it the same on all machines, and start again here",
                    )
        finally:
            self._line.close()

    def _next(self) -> Message:
        while (message := self._line.receive(_POLL_S)) is None:
            if self._line.lost:
                raise self._first_lost()
        return message

    def _first_lost(self) -> FirstLostError:
        message = f"the first machine ({self._part.endpoint.text}) is lost: {self._line.lost}"
        where = "" if self._files is None else f" `fsdpq resume {self._files.root}`"
        hint = f"start again on all machines{' with' if where else ''}{where}"
        return FirstLostError(message, hint=hint)

    def _or_tell(self, step: Callable[[Message], None], message: Message) -> None:
        try:
            step(message)
        except FsdpqError as error:
            self._line.send({"say": "failed", "message": error.message})
            raise

    def _prepare(self, message: Message) -> None:
        self._screen.report(f"part of a run that {message['first']} leads, and shows")
        recipe = Recipe.model_validate(message["recipe"])
        self._settled = dataclasses.replace(self._settled, recipe=recipe)
        self._inputs = gather_inputs(self._settled, screen=self._screen)
        self._line.send({"say": "prepared", "inputs": describe_inputs(self._inputs)})

    def _see(self, message: Message) -> None:
        files = RunFiles(self._part.run_dir or Path(message["run_dir"]))
        token = files.meeting(message["token"])
        deadline = time.monotonic() + SEE_S
        while not token.is_file():
            if time.monotonic() > deadline or self._line.lost:
                raise EnvironmentProblemError(
                    f"the run directory `{files.root}` of the first machine is not on this one",
                    hint="every rank writes its part of a checkpoint: put runs on storage that "
                    "all machines share, and name it with `--run-dir`",
                )
            time.sleep(_POLL_S)
        self._files = files
        self._screen.report(f"run directory {files.root}")
        self._line.send({"say": "sees"})

    def _run_ranks(self, message: Message) -> None:
        if self._files is None:
            raise LaunchError("the first machine starts ranks of a run that it did not name")
        runs = _Ranks(self._files, self._settled.recipe, self._line, message, self._address)
        self._screen.report(f"starting the ranks of machine {runs.place.node + 1} of "
                            f"{runs.place.num_nodes}")  # fmt: skip
        with held_inputs(self._inputs):
            end = runs.run(self._part.worker, self._inputs)
        remove_damaged_base(self._inputs, LaunchError("ranks failed"), end.records)
        if self._line.lost:
            raise self._first_lost()
        self._line.send({"say": "ended", "end": end_as_json(end)})
        if end.exit_code:
            self._screen.report("the ranks of this machine ended early")

    def _end(self, message: Message) -> RunFiles:
        code = int(message["code"])
        if code == ExitCode.OK and self._files is not None:
            self._screen.report("the run has finished: the first machine tells how it went")
            return self._files
        words, hint = str(message["message"]), str(message["hint"])
        kinds = {ExitCode.SAVED: RunSavedError, ExitCode.INTERRUPTED: RunStoppedError}
        if code in kinds:
            raise kinds[ExitCode(code)](words, hint=hint)
        error = LaunchError(words or "the run ended before this machine took part", hint=hint)
        error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.RUN_FAILED
        raise error


class _Ranks:
    """The ranks of this machine in one start; keeps them as the first machine says.

    Args:
        files: the run directory.
        recipe: resolved.
        line: to the first machine.
        message: what it said.
        address: of this machine.
    """

    def __init__(
        self, files: RunFiles, recipe: Recipe, line: Line, message: Message, address: str
    ) -> None:
        self._files, self._recipe, self._line = files, recipe, line
        self._resumes = bool(message["resumes"])
        self.place = Place(
            node=int(message["node"]),
            num_nodes=int(message["num_nodes"]),
            address=line.other_address,
            port=int(message["port"]),
            own_address=address,
            environment=network_environment(address),
        )
        num_ranks = int(recipe.launch.nproc_per_node)
        first = self.place.node * num_ranks
        self._ranks = range(first, first + num_ranks)
        self._watch = HangWatch(files, num_ranks, recipe.launch.hang_timeout_s, first)
        self._told_hang = False
        self._num_told = 0

    def run(self, worker: Sequence[str], inputs: dict[str, Any]) -> RanksEnd:
        """Runs them to their end, and returns how they ended."""
        files, node = self._files, self.place.node
        path = files.node_inputs(node)
        write_whole(path, (json.dumps(inputs, indent=2) + "\n").encode())
        flags = [*([RESUME_FLAG] if self._resumes else []), INPUTS_FLAG, str(path)]
        since, oom_kills = time.time(), count_oom_kills()
        code: int | None = None
        try:
            code, stopped_by = run_torchrun(
                files, self._recipe.launch, on_row=lambda _row: None, worker=[*worker, *flags],
                keeper=self, place=self.place,
            )  # fmt: skip
            code = None if stopped_by else code
        except _HaltedError:
            code = None
        end = read_end(
            files, exit_code=code, oom_kills_before=oom_kills, log=files.node_torchrun_log(node)
        )
        return own_part(end, self._ranks, since=since)

    def check(self) -> None:
        """Looks once: what the first machine says, and whether the ranks hang."""
        while (message := self._line.receive()) is not None:
            if message["say"] == "where":
                self._tell_hang()
            elif message["say"] in ("halt", "end"):
                raise _HaltedError
        if self._line.lost:
            raise _HaltedError
        if self._watch.sees_hang():
            self._tell_hang()

    def asked(self, stop: StopSignals) -> tuple[str, bool]:
        """Passes signals on to the first machine; ranks end here where somebody insists."""
        if len(stop.received) > self._num_told:
            self._num_told = len(stop.received)
            self._line.send({"say": "signal", "name": stop.name, "insists": stop.insists})
        return stop.name, stop.insists

    def ask_to_end(self, signal_name: str) -> bool:
        """Leaves it to the first machine to end the ranks."""
        return bool(signal_name)

    def _tell_hang(self) -> None:
        if not self._told_hang:
            self._told_hang = True
            self._line.send({"say": "hang", "hang": hang_as_json(self._watch.describe())})
