"""Packs several rows into one sequence, best fit decreasing.

Longest row first, each into the fullest sequence that still has room for it. The documents of a
sequence do not see each other: the loader restarts position ids at each, and the model builds its
attention from them. https://arxiv.org/abs/2404.10830 (Fewer Truncations Improve Language Modeling)

Which rows go together depends on lengths only, so rows of one length and sequences of one room are
dealt to each other many at a time: the work grows with the number of different lengths, not with
the number of rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fsdpq.data.text.tokenize import Row

Indices = npt.NDArray[np.int64]

GOLDEN_RATIO = 2654435769
"""Of 2^32: multiples of it modulo 2^32 are in no order (Knuth, TAOCP 3, 6.4)."""


def pack_lengths(lengths: npt.NDArray[np.int64], seq_len: int) -> list[Indices]:
    """Returns the row indices of each sequence; every row is in one of them.

    Rows of a sequence stand in the order of the data, sequences in the order of their longest rows:
    where the data is in no order of length, neither are the sequences. The result depends on the
    arguments only.

    Args:
        lengths: tokens of each row, ``(rows,)``, 1 or more.
        seq_len: the most tokens of a sequence.

    Raises:
        ValueError: a row is longer than ``seq_len``, or empty.
    """
    if lengths.size == 0:
        return []
    for length in (int(lengths.max()), int(lengths.min())):
        if not 1 <= length <= seq_len:
            raise ValueError(f"a row of {length} tokens does not fit into {seq_len}")
    # Rows of one length in an order of their own: the last ones of a length begin sequences.
    scrambled = np.arange(lengths.size, dtype=np.uint64) * GOLDEN_RATIO % 2**32
    by_length = np.lexsort((scrambled, -lengths))
    sequences = _assign(lengths[by_length], seq_len)
    rows = by_length[np.argsort(sequences, kind="stable")]
    sizes = np.bincount(sequences)
    starts = np.cumsum(sizes) - sizes
    longest = rows[starts]
    # Within a sequence by row: sort by sequence first, by row second.
    rows = rows[np.lexsort((rows, np.repeat(np.arange(sizes.size), sizes)))]
    return [rows[starts[i] : starts[i] + sizes[i]] for i in np.argsort(longest)]


def pack_rows(rows: Sequence[Row], seq_len: int) -> list[Row]:
    """Returns sequences of at most ``seq_len`` tokens that hold every row once.

    Raises:
        ValueError: a row is longer than ``seq_len``, or empty.
    """
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    return [_join([rows[i] for i in sequence]) for sequence in pack_lengths(lengths, seq_len)]


def fill_rate(rows: Sequence[Row], seq_len: int) -> float:
    """Returns the share of ``seq_len`` that rows fill on average, from 0 to 1."""
    return sum(len(row.input_ids) for row in rows) / (len(rows) * seq_len)


class _Rooms:
    """Sequences by the tokens that they still have room for."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # sorted
        self._sequences: dict[int, list[Indices]] = {}

    def best(self, length: int) -> int | None:
        """Returns the least room that a row of ``length`` tokens fits in."""
        place = bisect.bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else None

    def put(self, room: int, sequences: Indices) -> None:
        """Adds sequences behind those of the same room."""
        if room == 0 or sequences.size == 0:
            return
        if room not in self._sequences:
            bisect.insort(self._rooms, room)
            self._sequences[room] = []
        self._sequences[room].append(sequences)

    def take(self, room: int, most: int) -> Indices:
        """Removes the first ``most`` sequences of a room, or all that there are."""
        found = np.concatenate(self._sequences[room])
        if found.size > most:
            self._sequences[room] = [found[most:]]
        else:
            del self._sequences[room]
            self._rooms.remove(room)
        return found[:most]


def _assign(descending: npt.NDArray[np.int64], seq_len: int) -> Indices:
    """Returns the sequence of each row, numbered as they were begun, by its longest row."""
    rooms, begun = _Rooms(), 0
    assigned = np.empty(descending.size, dtype=np.int64)
    values, counts = np.unique(descending, return_counts=True)
    start = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        stop = start + count
        while start < stop:
            room = rooms.best(length)
            # What a row leaves is the best fit for the next of its length, until none fits.
            each = (room or seq_len) // length
            wanted = -(-(stop - start) // each)
            if room is None:
                taken = np.arange(begun, begun + wanted)
                begun += wanted
            else:
                taken = rooms.take(room, wanted)
            placed = min(each * taken.size, stop - start)
            assigned[start : start + placed] = np.repeat(taken, each)[:placed]
            full, rest = divmod(placed, each)
            rooms.put((room or seq_len) - each * length, taken[:full])
            rooms.put((room or seq_len) - rest * length, taken[full:])
            start += placed
    return assigned


def _join(rows: Sequence[Row]) -> Row:
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.loss_mask for row in rows]),
        tuple(len(row.input_ids) for row in rows),
    )
