"""`fsdpq chat` in a terminal of its own: editing, Ctrl-C, a worker that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.finished import FAKE_ANSWERER, finished_run
from support.terminals import Terminal

CODE = """
from fsdpq.launch.answers import AnswerSession
from fsdpq.cli.main import main
AnswerSession.__init__.__kwdefaults__["worker"] = {worker!r}
main(["chat", "run"])
"""
PROMPT = r"(?s:.*)\n(\S*)> "


@pytest.fixture
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A chat with a worker that has no model."""
    monkeypatch.setenv("NO_COLOR", "1")
    finished_run(tmp_path)
    shown = Terminal(["-c", CODE.format(worker=FAKE_ANSWERER)], tmp_path)
    shown.wait("Ctrl-C stops an answer")
    shown.wait(f"context of 64 tokens{PROMPT}")
    yield shown
    shown.close()


def test_lines_are_edited_and_come_back(screen: Terminal) -> None:
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


def test_ctrl_c_stops_the_answer_and_not_the_chat(screen: Terminal) -> None:
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


def test_a_worker_that_is_killed_leaves_a_message_and_a_working_terminal(screen: Terminal) -> None:
    os.kill(screen.worker().pid, signal.SIGKILL)
    screen.send("hello\n")
    screen.wait(r"error: the worker was killed \(SIGKILL\)")
    assert screen.end() == 1
    assert screen.is_restored
