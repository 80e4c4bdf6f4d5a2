"""Packs several rows into one sequence, best fit decreasing.

Longest row first, each into the fullest sequence that still has room for it. The documents of a
sequence do not see each other: the loader restarts position ids at each, and the model builds its
attention from them. https://arxiv.org/abs/2404.10830 (Fewer Truncations Improve Language Modeling)
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence

import numpy as np

from fsdpq.data.tokenize import Row


def pack_rows(rows: Sequence[Row], seq_len: int) -> list[Row]:
    """Returns sequences of at most ``seq_len`` tokens that hold every row once.

    The result depends on the order and the lengths of ``rows`` only.

    Raises:
        ValueError: a row is longer than ``seq_len``.
    """
    packed: list[list[Row]] = []
    open_by_room: dict[int, deque[list[Row]]] = {}
    rooms: list[int] = []  # the keys of open_by_room, sorted
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        if length > seq_len:
            raise ValueError(f"a row of {length} tokens does not fit into {seq_len}")
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            sequence = open_by_room[room].popleft()
            if not open_by_room[room]:
                del open_by_room[room], rooms[place]
        else:
            room, sequence = seq_len, []
            packed.append(sequence)
        sequence.append(row)
        left = room - length
        if left:
            if left not in open_by_room:
                bisect.insort(rooms, left)
                open_by_room[left] = deque()
            open_by_room[left].append(sequence)
    return [_join(sequence) for sequence in packed]


def fill_rate(rows: Sequence[Row], seq_len: int) -> float:
    """Returns the share of ``seq_len`` that rows fill on average, from 0 to 1."""
    return sum(len(row.input_ids) for row in rows) / (len(rows) * seq_len)


def _join(rows: Sequence[Row]) -> Row:
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.loss_mask for row in rows]),
        tuple(len(row.input_ids) for row in rows),
    )
