"""Deals rows to optimizer steps, ranks and micro-batches.

A row is one document, or one sequence of packed documents. Every step takes the next
``global_batch_size`` rows of one global order and deals them to the ranks in micro-batches. All
ranks run the same number of micro-batches: a rank without rows left gets an empty one, so any
number of ranks trains on the same rows and nobody waits for a collective that never comes. Every
rank goes through the whole order and keeps its part, so the ranks need not talk about it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fsdpq.data.dealing.collate import Step, collate, share_rows
from fsdpq.data.dealing.order import LoaderState, Position, check_resumable, epoch_order
from fsdpq.data.dealing.prefetch import Prefetch
from fsdpq.data.preparing.prepared import PreparedRows
from fsdpq.data.text.tokenize import Row

Int64 = npt.NDArray[np.int64]

STEPS_AHEAD = 2
"""Steps that are built while one is computed."""


class DealtRow(NamedTuple):
    """A row in the global order.

    Attributes:
        num_tokens: its length.
        num_trained: its tokens that carry loss.
        read: returns it; called on the rank only that computes it.
        after: the position after it.
    """

    num_tokens: int
    num_trained: int
    read: Callable[[], Row]
    after: Position


class RowOrder(Protocol):
    """Rows in their global order, the same on every rank, without end."""

    digest: str
    """Of the rows and of what else their order follows from, but for the seed."""

    seed: int
    """``training.seed``."""

    def deal(self, start: Position) -> Iterator[DealtRow]:
        """Yields the rows after ``start``, epoch after epoch."""
        ...

    def close(self) -> None:
        """Ends what `deal` has started in the background, and wakes who waits for it."""
        ...


class EpochOrder:
    """Rows that are all at hand, in memory or mapped, drawn anew in every epoch.

    Args:
        rows: what is trained on.
        seed: ``training.seed``.
        digest: hash of the rows.
        shuffle: False takes the rows as they come.
    """

    def __init__(self, rows: Sequence[Row], *, seed: int, digest: str, shuffle: bool) -> None:
        self._rows = rows
        self._lengths, self._num_trained = row_sizes(rows)
        self._shuffle = shuffle
        self.seed = seed
        self.digest = f"{digest} of {len(rows)} rows, {'shuffled' if shuffle else 'in order'}"

    def deal(self, start: Position) -> Iterator[DealtRow]:
        """Yields the rows after ``start``, epoch after epoch."""
        num_rows, first = len(self._rows), start.row
        for epoch in itertools.count(start.epoch):
            places = np.arange(num_rows)
            if self._shuffle:
                places = epoch_order(num_rows, seed=self.seed, epoch=epoch)
            for done, place in enumerate(places[first:], start=first + 1):
                is_last = done == num_rows
                yield DealtRow(
                    int(self._lengths[place]),
                    int(self._num_trained[place]),
                    functools.partial(self._rows.__getitem__, int(place)),
                    Position(epoch + 1) if is_last else Position(epoch, row=done),
                )
            first = 0

    def close(self) -> None:
        """Does nothing: rows are at hand."""


def row_sizes(rows: Sequence[Row]) -> tuple[Int64, Int64]:
    """Returns the tokens of each row, and those that carry loss; reads no mapped row for it."""
    if isinstance(rows, PreparedRows):
        return rows.lengths, rows.num_trained
    sizes = np.array([(len(row), row.num_trained) for row in rows], dtype=np.int64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]


@dataclass(frozen=True)
class Deal:
    """How rows become steps.

    Attributes:
        global_batch_size: rows of a step, over all ranks.
        micro_batch_size: rows that a rank computes at once.
        rank: this one.
        world_size: number of ranks.
        num_rows: rows of the whole run, over all epochs; the last step may have fewer than the
            others. None deals whole steps without end.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    num_rows: int | None = None


class Loader:
    """An iterator over one rank's steps, built in the background, that knows where it is.

    Args:
        order: the rows.
        deal: how they become steps.
        pin_to: the GPU whose page-locked memory steps are put into; None leaves them as they are.
    """

    def __init__(self, order: RowOrder, deal: Deal, *, pin_to: torch.device | None = None) -> None:
        self._order = order
        self._deal = deal
        self._pin_to = pin_to
        self._state = LoaderState(0, 0, Position(), order.seed, order.digest)
        self._steps: Prefetch[tuple[Step, LoaderState]] | None = None
        self._first: tuple[Step, LoaderState] | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        step, self._state = self._first or self._take()
        self._first = None
        return step

    def _take(self) -> tuple[Step, LoaderState]:
        if self._steps is None:
            steps = self._build_steps(self._state)
            self._steps = Prefetch(steps, depth=STEPS_AHEAD, name="fsdpq-steps")
        return next(self._steps)

    def start(self) -> None:
        """Builds the first step and keeps it: mistakes in the first rows are raised here."""
        if self._first is None:
            self._first = self._take()

    def state_dict(self) -> dict[str, Any]:
        """Returns the place after the last step that was taken, as plain JSON data.

        It is the same on every rank, and steps that are built ahead do not count.
        """
        return self._state.as_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the place that `state_dict` gave, of this run or of another.

        The number of ranks, the micro-batch and the global batch may be others: the rows that
        follow are the same in the same order.

        Raises:
            CheckpointError: the state belongs to other rows or another order.
        """
        saved = LoaderState.from_json(state)
        check_resumable(saved, self._state)
        self.close()
        self._state = saved

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether `load_state_dict` takes ``state``: it belongs to these rows in this order."""
        saved = LoaderState.from_json(state)
        return (saved.seed, saved.digest) == (self._state.seed, self._state.digest)

    def close(self) -> None:
        """Ends the threads in the background; the loader can be iterated further."""
        if self._steps is not None:
            self._steps.stop()
            self._order.close()
            self._steps.close()
            self._steps = self._first = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _build_steps(self, state: LoaderState) -> Iterator[tuple[Step, LoaderState]]:
        if self._pin_to is not None:
            torch.cuda.set_device(self._pin_to)  # of this thread, which knows GPU 0 otherwise
        deal, dealt = self._deal, self._order.deal(state.position)
        while True:
            left = None if deal.num_rows is None else deal.num_rows - state.rows
            size = deal.global_batch_size if left is None else min(deal.global_batch_size, left)
            if size <= 0:
                return
            step, after = self._build_step(dealt, size)
            state = state.after(size, after)
            yield (step if self._pin_to is None else step.pin_memory()), state

    def _build_step(self, dealt: Iterator[DealtRow], size: int) -> tuple[Step, Position]:
        batch = list(itertools.islice(dealt, size))
        shares = share_rows(
            [row.num_tokens for row in batch],
            micro_batch_size=self._deal.micro_batch_size,
            rank=self._deal.rank,
            world_size=self._deal.world_size,
        )
        step = Step(
            [collate([batch[index].read() for index in share]) for share in shares],
            num_trained=sum(row.num_trained for row in batch),
            num_tokens=sum(row.num_tokens for row in batch),
        )
        return step, batch[-1].after


def split_rows(num_rows: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns row indices for training and for evaluation.

    The held-out rows depend on the seed only. At least one row is held out when a fraction is
    asked for and there are two rows or more.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    num_eval = min(num_rows - 1, max(1, round(num_rows * eval_fraction))) if eval_fraction else 0
    return sorted(order[num_eval:]), sorted(order[:num_eval])
