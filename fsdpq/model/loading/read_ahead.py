"""Asks the system to bring this rank's next bytes of a checkpoint into the page cache.

While a matrix is quantized the disk would wait, since the system reads ahead only inside a range
that is read already, and a rank's rows of the next matrix lie elsewhere. One thread announces the
ranges that come next, a bounded window ahead of the reads. Nothing is read into this process: what
was announced lies in the page cache, which the system takes back when it needs memory. Where there
is no ``posix_fadvise`` (macOS, Windows) nothing is announced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fsdpq.model.loading.checkpoint_files import ByteRange

WINDOW_BYTES = 256 << 20
"""How far ahead of the reads ranges are announced, about."""

PIECE_BYTES = 8 << 20
"""A range is announced in pieces of this size."""


class ReadAhead:
    """Announces byte ranges in the order in which they are read.

    Args:
        ranges: what is read for each target, in order of reading.
        window_bytes: how far ahead of the reads.
    """

    def __init__(
        self, ranges: Mapping[str, Sequence[ByteRange]], *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._window_bytes = window_bytes
        self._pieces: list[tuple[int, ByteRange]] = []
        self._spans: dict[str, tuple[int, int]] = {}
        position = 0
        for name, parts in ranges.items():
            first = position
            for piece in (piece for part in parts for piece in _cut(part)):
                self._pieces.append((position, piece))
                position += piece.stop - piece.start
            self._spans[name] = (first, position)
        self._next = 0
        self._thread = ThreadPoolExecutor(1, "read-ahead") if can_announce() else None

    def move_to(self, name: str, num_bytes: int) -> None:
        """Says that ``num_bytes`` of target ``name``, and all targets before it, have been read."""
        if self._thread is None or name not in self._spans:
            return
        first, stop = self._spans[name]
        horizon = min(first + num_bytes, stop) + self._window_bytes
        while self._next < len(self._pieces) and self._pieces[self._next][0] < horizon:
            self._thread.submit(announce, self._pieces[self._next][1])
            self._next += 1


def can_announce() -> bool:
    """Whether this system takes announcements."""
    return hasattr(os, "posix_fadvise")


def announce(part: ByteRange) -> None:
    """Has the system read ``part`` into the page cache; a failure is left to the read itself."""
    with contextlib.suppress(OSError), part.path.open("rb", buffering=0) as file:
        size = part.stop - part.start
        os.posix_fadvise(file.fileno(), part.start, size, os.POSIX_FADV_WILLNEED)


def _cut(part: ByteRange) -> list[ByteRange]:
    starts = range(part.start, part.stop, PIECE_BYTES)
    return [ByteRange(part.path, at, min(at + PIECE_BYTES, part.stop)) for at in starts]
