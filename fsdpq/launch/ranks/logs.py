"""Keeping the logs of ranks from filling the disk.

A library that warns at every step writes gigabytes in a day. Ranks append to their logs
(`fsdpq.worker.guard`), so the launcher may shorten one while its rank writes: what comes next goes
to the new end. What is written in the moment of the cut may be lost.
"""

from __future__ import annotations

import os
from pathlib import Path

from fsdpq.run_files.paths import RunFiles

MAX_LOG_BYTES = 64 * 2**20
HEAD_BYTES = 2**20
"""Kept from the beginning: what the libraries say at the start."""

TAIL_BYTES = 8 * 2**20
"""Kept from the end: what led to where the rank is."""


def bound_logs(files: RunFiles) -> None:
    """Cuts the middle out of the ranks' logs that have become too long."""
    for path in files.logs.glob("rank-*.log"):
        if path.stat().st_size > MAX_LOG_BYTES:
            _cut_middle(path)


def _cut_middle(path: Path) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - TAIL_BYTES)
        tail = file.read()
        tail = tail[tail.find(b"\n") + 1 :]  # from a whole line on
        file.seek(0)
        head = file.read(HEAD_BYTES)
        head = head[: head.rfind(b"\n") + 1] or head
        left_out = size - len(head) - len(tail)
        os.truncate(path, len(head))
    with path.open("ab", buffering=0) as file:
        file.write(b"\n[fsdpq left out %d bytes here: the log was too long]\n\n" % left_out + tail)
