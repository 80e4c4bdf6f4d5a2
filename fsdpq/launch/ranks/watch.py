"""Seeing that a run hangs: no rank gives a sign of life for longer than it may take.

A rank that waits for others gives none either, so one that is stuck silences all. Only the time in
which this process itself ran counts: a machine that was suspended, or a launcher that was stopped,
is no hang.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import psutil

from fsdpq.errors import LaunchError
from fsdpq.launch.ranks.stacks import RankStack, ask_stacks
from fsdpq.run_files.beats import BEAT_LAYOUT, Beat
from fsdpq.run_files.paths import RunFiles

MIN_LIMIT_S = 60.0
PATIENT_S = 1800.0
"""Before the second step, and outside of training, where a rank may work long without a sign."""
PAUSES = 10
"""``auto`` waits so many times the longest pause."""
MAX_GAP_S = 1.0
"""More than this between two looks is not the ranks' time but this process's."""

_PARTS = {
    "data": "waiting for rows of",
    "forward": "in the forward pass of",
    "backward": "in the backward pass of",
    "optimizer": "in the optimizer of",
    "log": "reading the losses of",
    "agree": "after",
    "evaluate": "in the evaluation after",
    "save": "saving after",
}


@dataclass(frozen=True)
class Hang:
    """Ranks of one machine that hang, or wait for others that do.

    Attributes:
        beats: last signs of life by rank.
        stacks: where the ranks are.
        idle_s: how long nothing happened.
    """

    beats: Mapping[int, Beat]
    stacks: Mapping[int, RankStack]
    idle_s: float


@dataclass
class HangWatch:
    """Watches the heartbeats of the ranks of one run on this machine.

    Attributes:
        files: the run directory.
        num_ranks: on this machine.
        limit: seconds without progress, ``auto``, or None for no limit.
        first_rank: the lowest of them.
    """

    files: RunFiles
    num_ranks: int
    limit: float | Literal["auto"] | None
    first_rank: int = 0
    _maps: dict[int, mmap.mmap] = field(default_factory=dict[int, mmap.mmap])
    _beats: dict[int, Beat] = field(default_factory=dict[int, Beat])
    _looked: float = field(default_factory=time.monotonic)
    _idle_s: float = 0.0
    _longest_s: float = 0.0
    _first_step: int = 0

    def __post_init__(self) -> None:
        """Removes the heartbeats of an earlier run of the directory."""
        for rank in self._ranks():
            self.files.heartbeat(rank).unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """Returns the process ids of the ranks that gave a sign."""
        return [beat.pid for beat in self._beats.values() if psutil.pid_exists(beat.pid)]

    def check(self) -> None:
        """Looks once; call it several times a second.

        Raises:
            LaunchError: the ranks hang; says which one, and where every one of them is.
        """
        if self.sees_hang():
            raise explain_hang(self.files, self.describe())

    def sees_hang(self) -> bool:
        """Looks once; returns whether the ranks hang."""
        now = time.monotonic()
        self._idle_s += min(now - self._looked, MAX_GAP_S)
        self._looked = now
        beats = {rank: beat for rank in self._ranks() if (beat := self._read(rank))}
        if beats != self._beats:
            if self._is_steady():
                self._longest_s = max(self._longest_s, self._idle_s)
            self._beats, self._idle_s = beats, 0.0
            steps = [beat.step for beat in beats.values() if beat.phase == "train"]
            self._first_step = self._first_step or max(steps, default=0)
        elif self.limit is not None and beats and self._idle_s > self._limit_s(self.limit):
            if len(self.pids()) < len(beats):
                self._idle_s = 0.0  # a rank has ended: torchrun's matter
            else:
                return True
        return False

    def describe(self) -> Hang:
        """Returns where the ranks are."""
        stacks = ask_stacks(self.files, {rank: beat.pid for rank, beat in self._beats.items()})
        return Hang(dict(self._beats), stacks, self._idle_s)

    def _ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.num_ranks)

    def _limit_s(self, limit: float | Literal["auto"]) -> float:
        seconds = max(MIN_LIMIT_S, PAUSES * self._longest_s) if limit == "auto" else limit
        return seconds if self._is_steady() else max(seconds, PATIENT_S)

    def _is_steady(self) -> bool:
        """Whether all ranks train, and have done a step: it may have compiled, or grown memory."""
        beats = self._beats.values()
        return len(beats) == self.num_ranks and all(
            beat.phase == "train" and beat.step > self._first_step > 0 and beat.part != "save"
            for beat in beats
        )

    def _read(self, rank: int) -> Beat | None:
        if rank not in self._maps:
            path = self.files.heartbeat(rank)
            if not path.exists() or path.stat().st_size < BEAT_LAYOUT.size:
                return None
            with path.open("rb") as file:  # mapped, it is there even when the directory is not
                self._maps[rank] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        beat = Beat.unpack(self._maps[rank][: BEAT_LAYOUT.size])
        return beat if beat.count else None


def explain_hang(files: RunFiles, *hangs: Hang, on: Mapping[int, str] | None = None) -> LaunchError:
    """Returns the error that names the rank that the others wait for, and where each one is.

    Args:
        files: the run directory.
        hangs: of every machine.
        on: `` on HOST`` of a rank, where there are several machines.
    """
    beats = {rank: beat for hang in hangs for rank, beat in hang.beats.items()}
    stacks = {rank: stack for hang in hangs for rank, stack in hang.stacks.items()}
    names = {rank: f"rank {rank}{(on or {}).get(rank, '')}" for rank in beats}
    idle_s = max(hang.idle_s for hang in hangs)

    def suspicion(rank: int) -> tuple[bool, bool, int]:
        stack = stacks[rank]
        return (bool(stack.frames), stack.waits, beats[rank].count)

    culprit = min(sorted(beats), key=suspicion)
    message = f"the ranks hang: none has got further for {idle_s:.0f} s"
    if stacks[culprit].waits:
        message += "; all of them wait for each other, so the connection between them may be lost"
    else:
        message += f"; {names[culprit]} is stuck {_where(beats[culprit])}: {stacks[culprit].place}"
    lines = [
        f"{names[rank]}: {_where(beat)}, {'waits in ' if stacks[rank].waits else ''}"
        f"{stacks[rank].place}"
        for rank, beat in sorted(beats.items())
    ]
    lines.append(f"all stacks: {files.logs}/rank-*.stack")
    hint = "a run that is only slow needs a larger `launch.hang_timeout_s`"
    return LaunchError(message, hint=hint, details="\n".join(lines))


def _where(beat: Beat) -> str:
    if beat.phase != "train" or not beat.part:
        return f"in the phase `{beat.phase or 'start'}`"
    return f"{_PARTS.get(beat.part, beat.part)} step {beat.step}"
