"""What of a file is in the system's page cache, and taking it out of there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)


def drop(path: Path) -> None:
    """Asks for the pages of a file to leave the page cache; mapped ones stay."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def drop_mapped(path: Path) -> None:
    """The same, of a file that this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            # The pages leave this process; read again, they come from the file.
            LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
    drop(path)


def anonymous_bytes() -> int:
    """Returns the memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def resident_bytes(path: Path, start: int, stop: int) -> int:
    """Returns how much of bytes ``[start, stop)`` is in the page cache; they begin at a page."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    pages = (ctypes.c_ubyte * -(-(stop - start) // mmap.PAGESIZE))()
    where = ctypes.c_void_p(address + start)
    if LIBC.mincore(where, ctypes.c_size_t(stop - start), pages) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return mmap.PAGESIZE * sum(page & 1 for page in pages)
