"""A base with a change merged into it, by rows; nothing of it is kept.

The sum is made in fp32 and cast once, to the dtype in which the weight is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsdpq.worker.merge.bases import BaseRows, matrix_rows
from fsdpq.worker.merge.changes import Change

CHUNK_WEIGHTS = 1 << 22
"""Weights that are merged at once, about: 16 MiB in fp32, of which some exist at a time."""


class Rows(NamedTuple):
    """Rows of one weight before and after, both fp32 on the host."""

    base: Tensor
    trained: Tensor


class MergedWeights:
    """The weights of a trained model; reads like a checkpoint (`fsdpq.model.loading.source`).

    Args:
        base: what training started from.
        change: what was trained.
        shapes: of all weights, by their names in transformers.
        untrained: leave the change out: the model as it was before training.
    """

    num_read_bytes = 0
    """Of a checkpoint's files; not counted here."""

    def __init__(
        self,
        base: BaseRows,
        change: Change,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        untrained: bool = False,
    ) -> None:
        self._base = base
        self._change = change
        self._untrained = untrained
        self.shapes = shapes

    def is_changed(self, name: str) -> bool:
        """Whether training changed the weight."""
        return name in self._change.names and not self._untrained

    def read_both(self, name: str, start: int, stop: int) -> Rows:
        """Returns rows of a changed weight, before and after."""
        base = self._read_base(name, start, stop).float()
        return Rows(base, self._change.apply(name, base, start))

    def read_matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows of a weight, all dimensions but the last flattened to one.

        Those of a changed one are fp32, others have the base's dtype.
        """
        if self.is_changed(name):
            return self.read_both(name, start, stop).trained
        return self._read_base(name, start, stop)

    def _read_base(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._base.read(name, start, stop)
        is_zero = self._change.starts_at_zero and name in self._change.names
        return torch.zeros_like(rows) if is_zero else rows

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` of the first dimension, as `read_matrix_rows` does."""
        shape = self.shapes[name]
        if not shape:
            return self.read_matrix_rows(name, 0, 1).reshape(())
        each = torch.Size(shape[1:-1]).numel()
        rows = self.read_matrix_rows(name, start * each, stop * each)
        return rows.reshape(stop - start, *shape[1:])

    def read(self, name: str) -> Tensor:
        """Returns a whole weight, put together from chunks.

        Memory: the weight, and a chunk in fp32.
        """
        shape = self.shapes[name]
        whole: Tensor | None = None
        for start, stop in row_chunks(shape, 0, matrix_rows(shape)):
            rows = self.read_matrix_rows(name, start, stop)
            if whole is None:
                whole = rows.new_empty((matrix_rows(shape), *rows.shape[1:]))
            whole[start:stop] = rows
        return (torch.empty(0) if whole is None else whole).reshape(shape)


def row_chunks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields parts of rows ``[start, stop)`` of a weight, of about `CHUNK_WEIGHTS` each."""
    width = torch.Size(shape[1:][-1:]).numel()
    step = max(1, CHUNK_WEIGHTS // max(1, width))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


OnRows = Callable[[str, Rows, Tensor], Any]
"""Told of every chunk of a changed weight: its name, its rows, and those that are stored."""


def cast_chunks(
    weights: MergedWeights, name: str, start: int, stop: int, dtype: torch.dtype, on_rows: OnRows
) -> Iterator[Tensor]:
    """Yields rows ``[start, stop)`` of a weight as they are written, chunk by chunk."""
    for first, last in row_chunks(weights.shapes[name], start, stop):
        if not weights.is_changed(name):
            rows = weights.read_matrix_rows(name, first, last)
            yield rows.to(dtype)
            continue
        both = weights.read_both(name, first, last)
        stored = both.trained.to(dtype)
        on_rows(name, both, stored)
        yield stored
