"""`fsdpq chat` in a terminal of its own: editing, Ctrl-C, a worker that dies."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.finished import FAKE_ANSWERER, finished_run

CODE = """
from fsdpq.launch.answers import AnswerSession
from fsdpq.cli.main import main
AnswerSession.__init__.__kwdefaults__["worker"] = {worker!r}
main(["chat", "run"])
"""
PROMPT = r"(?s:.*)\n(\S*)> "


class Screen:
    """A command in a terminal of its own."""

    def __init__(self, code: str, folder: Path) -> None:
        self.text = ""
        self._seen = 0
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, "-c", code], os.environ | {"TERM": "xterm"})
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


@pytest.fixture
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """A chat with a worker that has no model."""
    monkeypatch.setenv("NO_COLOR", "1")
    finished_run(tmp_path)
    shown = Screen(CODE.format(worker=FAKE_ANSWERER), tmp_path)
    shown.wait("Ctrl-C stops an answer")
    shown.wait(f"context of 64 tokens{PROMPT}")
    yield shown
    shown.close()


def test_lines_are_edited_and_come_back(screen: Screen) -> None:
    screen.send("onx\x7fe\n")
    assert "as one\n" in screen.wait(f"as {PROMPT}")
    screen.send("\x1b[A\n")  # arrow up
    assert "as one\n" in screen.wait(f"as {PROMPT}")
    screen.send("Count \\\n")
    screen.wait(r"\.\.\. ")
    screen.send("slowly\n")
    assert "as Count \nslowly" in screen.wait(f"as {PROMPT}")
    screen.send("control\n")
    screen.wait(rf"␛\[2Jred    tab\nline{PROMPT}")  # cleared no screen
    screen.send("/base\n")
    screen.wait(r"before training(?s:.*)base> ")
    worker = screen.worker()
    screen.send("\x04")
    assert screen.end() == 0
    assert screen.is_restored
    assert not worker.is_running()


def test_ctrl_c_stops_the_answer_and_not_the_chat(screen: Screen) -> None:
    screen.send("long\n")
    screen.wait("as long")
    screen.send("\x03")
    screen.wait(rf"\(stopped\){PROMPT}")
    screen.send("again\n")
    screen.wait(f"as again{PROMPT}")
    screen.interrupt("unsent")
    screen.wait(f"ends the chat{PROMPT}")
    screen.interrupt()
    assert screen.end() == 0
    assert screen.is_restored


def test_a_worker_that_is_killed_leaves_a_message_and_a_working_terminal(screen: Screen) -> None:
    os.kill(screen.worker().pid, signal.SIGKILL)
    screen.send("hello\n")
    screen.wait(r"error: the worker was killed \(SIGKILL\)")
    assert screen.end() == 1
    assert screen.is_restored
