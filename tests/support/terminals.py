"""Commands in a terminal of their own, and what a terminal shows of a text."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import psutil


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, arguments: Sequence[str], folder: Path, *, columns: int = 80) -> None:
        self.text = ""
        self._seen = 0
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            command = [sys.executable, *arguments]
            os.execve(sys.executable, command, os.environ | {"TERM": "xterm"})
        self.resize(columns)
        self._settings = termios.tcgetattr(self._terminal)

    @property
    def is_restored(self) -> bool:
        """Whether the terminal echoes and edits lines as before."""
        return termios.tcgetattr(self._terminal)[:4] == self._settings[:4]

    def wait(self, pattern: str, timeout: float = 60) -> str:
        """Returns what came until ``pattern``, which is waited for."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.text[self._seen :])) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            assert self._read(), f"ended before {pattern!r}:\n{self.text}"
        start, self._seen = self._seen, self._seen + found.end()
        return self.text[start : self._seen]

    def resize(self, columns: int) -> None:
        """Makes it as wide as that."""
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt(self, before: str = "") -> None:
        """Types ``before`` and Ctrl-C, once the command waits for keys.

        Between a prompt and that, Python's readline notices a signal with the next key only.
        """
        while psutil.Process(self._pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        self.send(f"{before}\x03")

    def end(self) -> int:
        """Waits for the end of the command and returns its exit code."""
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Ends the command where it has not ended yet."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)

    def worker(self) -> psutil.Process:
        return psutil.Process(self._pid).children()[0]

    def _read(self) -> bool:
        if select.select([self._terminal], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):
                data = os.read(self._terminal, 65536)
                self.text += data.decode(errors="replace").replace("\r\n", "\n")
                return bool(data)
            return False
        return True


def shown(text: str) -> list[str]:
    """Returns the lines that a terminal shows in the end: a carriage return goes to the start."""
    lines: list[str] = []
    for line in text.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines
