"""Directories in use: a lock of the system on the directory itself, gone with its process.

Several processes may hold a directory; whoever wants to remove it must have it alone. No lock file
is written, so a directory that cannot be written can be held too. A file system without such locks
(some network ones) gives none: then nothing is kept from being removed, as before there were any.
https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def hold(directory: Path) -> Generator[bool, None, None]:
    """Keeps ``directory`` from being removed until the block ends; gives whether it is there."""
    with _open(directory) as descriptor:
        if descriptor is not None:
            _lock(descriptor, fcntl.LOCK_SH)
        yield descriptor is not None and _is_still(directory, descriptor)


@contextlib.contextmanager
def claim(directory: Path) -> Generator[bool, None, None]:
    """Gives whether this process may remove ``directory``: it is there and nobody holds it."""
    with _open(directory) as descriptor:
        free = descriptor is not None and _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield free and descriptor is not None and _is_still(directory, descriptor)


def is_held(directory: Path) -> bool:
    """Whether some process uses ``directory``."""
    with claim(directory) as free:
        return directory.is_dir() and not free


def is_claimed(directory: Path) -> bool:
    """Whether some process has ``directory`` alone (`claim`); those that only hold it do not count.

    May be asked at any time: it keeps nobody but a `claim` of the same moment from succeeding.
    """
    with _open(directory) as descriptor:
        return descriptor is not None and not _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def _open(directory: Path) -> Generator[int | None, None, None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        return error.errno not in _BUSY
    return True


def _is_still(directory: Path, descriptor: int) -> bool:
    """Whether the name still leads to what was opened, which may have been removed meanwhile."""
    try:
        return os.path.samestat(directory.stat(), os.fstat(descriptor))
    except OSError:
        return False
