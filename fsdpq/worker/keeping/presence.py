"""Shows others that a rank is at work in a run directory: a lock that ends with the process.

The launcher's side is `fsdpq.launch.runs.ownership`.
https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import fcntl
import os

from fsdpq.run_files.paths import RunFiles


def show_presence(files: RunFiles) -> None:
    """Holds the folder of logs, beside other ranks, for as long as this process lives.

    On a file system without such locks nothing is held.
    """
    descriptor = os.open(files.logs, os.O_RDONLY)  # stays open: closing it would let go
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
