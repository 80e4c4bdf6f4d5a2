"""`fsdpq generate` and `fsdpq chat` with the real worker, in a terminal and through pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from support.commands import Run

from fsdpq.run_files import RunFiles, read_json_lines


@pytest.fixture(scope="module")
def trained(project: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run of the tiny project with checkpoints; one process, some steps."""
    files = RunFiles(tmp_path_factory.mktemp("trained") / "run")
    command = [
        sys.executable, "-m", "fsdpq", "train", "recipe.yaml", "launch.nproc_per_node=1",
        "checkpoint.interval=8", "checkpoint.keep_last=3", "--run-dir", str(files.root),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return files


def test_both_answer_as_the_run_did(
    fsdpq: Run, project: Path, environment: dict[str, str], trained: RunFiles, tmp_path: Path
) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "What is one?"}\n{"prompt": "What is two?", "system": "x"}\n')
    done = fsdpq("generate", str(trained.root), "--file", str(rows), "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    samples = [row for row in read_json_lines(trained.events) if row["event"] == "sample"]
    answers = {row["when"]: row["answer"] for row in samples}
    assert answers["after"] != answers["before"]
    # Unsharded and dequantized once, and yet the same as in the run.
    assert first["answer"] == answers["after"]
    assert second["num_tokens"] <= 8

    # The last checkpoint is what was exported; without it the model is as it was before.
    talk = subprocess.run(
        [
            sys.executable, "-m", "fsdpq", "chat", str(trained.root), "--checkpoint=newest",
            "--dequantize=never", "--temperature=0", "--max-new-tokens=8",
        ],
        cwd=project, env=environment, input="What is one?\n/base\n/retry\n", text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout == f"{answers['after']}\n{answers['before']}\n"
    assert "note: answers come from the checkpoint of step 24" in talk.stderr


class Screen:
    """A command in a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.text = ""
        self._seen = 0
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            command = [sys.executable, "-m", "fsdpq", *arguments]
            os.execve(sys.executable, command, environment | {"TERM": "xterm"})
        self._settings = termios.tcgetattr(self._terminal)

    @property
    def is_restored(self) -> bool:
        """Whether the terminal echoes and edits lines as before."""
        return termios.tcgetattr(self._terminal)[:4] == self._settings[:4]

    def wait(self, pattern: str, timeout: float = 120) -> str:
        """Returns what came until ``pattern``, which is waited for."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.text[self._seen :])) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            assert self._read(), f"ended before {pattern!r}:\n{self.text}"
        start, self._seen = self._seen, self._seen + found.end()
        return self.text[start : self._seen]

    def send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def end(self) -> int:
        """Waits for the end of the command and returns its exit code."""
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)

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


def test_a_talk_in_a_terminal(
    project: Path, environment: dict[str, str], trained: RunFiles
) -> None:
    screen = Screen(
        ["chat", str(trained.root), "--temperature=0", "--max-new-tokens=200"], project, environment
    )
    screen.wait("run: lora on model")
    screen.wait(r"context of 256 tokens.*\n(?s:.*)> ")
    screen.send("What is one?\n")
    first = screen.wait("\n(?s:.*)> ")
    assert "\ufffd" not in first
    screen.send("/info\n")
    screen.wait(r"0 of them known already(?s:.*)> ")
    screen.send("/undo\n")
    screen.wait("taken back: What is one(?s:.*)> ")
    # The line is edited: what was typed wrong is taken back, and an arrow brings the last one.
    screen.send("/nonsenxx\x7f\x7fse\n")
    screen.wait("there is no `/nonsense`(?s:.*)> ")
    screen.send("\x1b[A\n")
    screen.wait("there is no `/nonsense`(?s:.*)> ")
    screen.send("/temperature 3\n")
    screen.wait("temperature 3(?s:.*)> ")
    screen.send("Count \\\n")
    screen.wait(r"\.\.\. ")
    screen.send("slowly\n")
    screen.wait(r"slowly\n(?s:.*)\S")
    screen.send("\x03")
    screen.wait(r"\(stopped\)(?s:.*)> ")
    screen.send("/base\n")
    screen.wait("before training(?s:.*)base> ")
    screen.send("unsent\x03")
    screen.wait("ends the chat(?s:.*)base> ")
    # A worker that is killed leaves a message, and the terminal as it was.
    os.kill(screen.worker().pid, signal.SIGKILL)
    screen.send("hello\n")
    screen.wait(r"error: the worker was killed \(SIGKILL\)")
    assert screen.is_restored
    assert screen.end() == 1
