"""Who has, or had, a run, and how that ended: ``logs/launcher.json``."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fsdpq.errors import ExitCode, FsdpqError
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole


@dataclass(frozen=True)
class LauncherRecord:
    """The launcher that took a run last.

    Attributes:
        pid: of its process.
        host: machine that it runs on.
        time: when it took the run, in seconds since the epoch.
        ended: when it let go of it, None where it has not, or was killed.
        exit_code: what it told the shell then.
        error: one line for why the run did not come to its end, else empty.
    """

    pid: int
    host: str
    time: float
    ended: float | None = None
    exit_code: int | None = None
    error: str = ""

    @classmethod
    def of_this_process(cls) -> LauncherRecord:
        """Returns the record of a launcher that takes a run now."""
        return cls(os.getpid(), socket.gethostname(), time.time())

    def ended_by(self, error: BaseException | None) -> LauncherRecord:
        """Returns the record of a launcher that lets go now.

        Args:
            error: what it raises, None where the run came to its end.
        """
        code, text = ExitCode.OK, ""
        if isinstance(error, FsdpqError):
            code, text = error.exit_code, error.message
        elif isinstance(error, KeyboardInterrupt):
            code, text = ExitCode.INTERRUPTED, "stopped"
        elif error is not None:
            code, text = ExitCode.RUN_FAILED, f"{type(error).__name__}: {error}"
        line = text.strip().partition("\n")[0]
        return replace(self, ended=time.time(), exit_code=int(code), error=line)


def write_launcher(files: RunFiles, record: LauncherRecord) -> None:
    """Writes the record of a run; see `write_owner`."""
    write_owner(files.launcher, record)


def read_launcher(files: RunFiles) -> LauncherRecord | None:
    """Returns the record of a run; None where nobody took it yet, or it cannot be read."""
    return read_owner(files.launcher)


def write_owner(path: Path, record: LauncherRecord) -> None:
    """Writes a record.

    Raises:
        OSError: the disk refuses, or the directory is gone.
    """
    write_whole(path, (json.dumps(asdict(record)) + "\n").encode())


def read_owner(path: Path) -> LauncherRecord | None:
    """Returns a record; None where there is none, or it cannot be read."""
    try:
        return LauncherRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
