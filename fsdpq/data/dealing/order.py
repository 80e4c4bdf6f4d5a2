"""In which order rows are trained on, and how a run says where it is in that order.

The order depends on the seed, the epoch and, for a stream, the window: not on ranks, micro-batches
or the version of a library. It is that of 64-bit numbers drawn by Philox4x64-10, whose key comes
out of numpy's ``SeedSequence``; both are fixed by numpy's promise to keep their streams
(https://numpy.org/neps/nep-0019-rng-policy.html), while ``permutation`` is not. A seed and an epoch
are mixed rather than added: seed 1 has in no epoch an order of seed 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdpq.errors import CheckpointError


@dataclass(frozen=True, order=True)
class Position:
    """A place between two rows of the global order.

    Attributes:
        epoch: of the next row, from 1.
        window: of the next row in its epoch, from 0; always 0 where rows are not streamed.
        row: rows of that window that come before it.
    """

    epoch: int = 1
    window: int = 0
    row: int = 0


@dataclass(frozen=True)
class LoaderState:
    """How far a run is in its rows: all that another run needs to go on, with any number of ranks.

    Attributes:
        steps: optimizer steps that were dealt.
        rows: rows that were dealt in them, over all ranks and epochs.
        position: of the next row.
        seed: ``training.seed``, which the order follows from.
        digest: of the rows and of what else the order follows from.
    """

    steps: int
    rows: int
    position: Position
    seed: int
    digest: str

    def after(self, num_rows: int, position: Position) -> LoaderState:
        """Returns the state after one more step of ``num_rows`` rows."""
        return replace(self, steps=self.steps + 1, rows=self.rows + num_rows, position=position)

    def as_json(self) -> dict[str, Any]:
        """Returns the same as plain JSON data."""
        return {**vars(self), "position": vars(self.position).copy()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoaderState:
        """Returns what `as_json` wrote.

        Raises:
            CheckpointError: it is not what it wrote.
        """
        try:
            state = cls(**{**data, "position": Position(**data["position"])})
        except (KeyError, TypeError) as error:
            raise _no_state(f": {error}") from error
        numbers = (state.steps, state.rows, state.seed, *vars(state.position).values())
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise _no_state("")
        return state


def _no_state(why: str) -> CheckpointError:
    message = f"this is no position in the training data{why}"
    return CheckpointError(message, hint="use a checkpoint of this version")


def check_resumable(saved: LoaderState, own: LoaderState) -> None:
    """Checks that a run can go on from ``saved``.

    Raises:
        CheckpointError: its rows, or their order, are not those of this run.
    """
    if saved.seed != own.seed:
        message = f"the checkpoint's rows come in the order of `training.seed: {saved.seed}`, "
        message += f"this run's in that of {own.seed}"
        raise CheckpointError(message, hint=f"use training.seed={saved.seed}")
    if saved.digest != own.digest:
        raise CheckpointError(
            "the checkpoint was made with other training rows: its position means nothing in these",
            hint="use the data and the `data` section of that run, or start anew",
        )


def epoch_order(num_rows: int, *, seed: int, epoch: int, window: int = 0) -> npt.NDArray[np.int64]:
    """Returns the rows of an epoch, or of one window of it, in the order of training.

    Args:
        num_rows: how many there are.
        seed: ``training.seed``.
        epoch: from 1.
        window: from 0.
    """
    key = np.random.SeedSequence(seed, spawn_key=(epoch, window))
    return np.argsort(np.random.Philox(key).random_raw(num_rows), kind="stable")
