"""Two hosts made of network namespaces on this machine, with a cable between them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

COMMAND = Path(__file__).with_name("waiting_command.py")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_no_hosts() -> str:
    """Returns why namespaces cannot be made here, empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip`: install iproute2"
    name = f"fsdpq-{secrets.token_hex(4)}"
    command = ["ip", "netns", "add", name]
    tried = subprocess.run(command, check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Launcher:
    """A command that runs on a host; what it prints goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process, self.output = process, output

    def end(self, timeout_s: float = 120.0) -> int:
        """Waits for its end; returns its exit code."""
        return self._process.wait(timeout_s)

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text()

    def ask(self, number: signal.Signals) -> None:
        """Sends it a signal, as one user of the host does."""
        self._process.send_signal(number)

    def kill_all(self) -> None:
        """Kills it and all that it started, at once, as a host that loses power does."""
        found = [psutil.Process(self._process.pid)] if self._process.poll() is None else []
        for process in [*found, *(child for each in found for child in each.children(True))]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


class Hosts:
    """Two hosts. Each has an address of its own, and a loopback.

    Args:
        project: where commands run.
        environment: of the commands.
        outputs: where they print.
    """

    def __init__(self, project: Path, environment: dict[str, str], outputs: Path) -> None:
        name = f"fsdpq-{os.getpid()}-{secrets.token_hex(3)}"
        self._project, self._environment, self._outputs = project, environment, outputs
        self._names = [f"{name}-{letter}" for letter in "ab"]
        self._launchers: list[Launcher] = []
        for each in self._names:
            _ip("netns", "add", each)
        one, other = self._names
        cable = ["link", "add", "cable", "netns", one, "type", "veth"]
        _ip(*cable, "peer", "name", "cable", "netns", other)
        for each, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", each, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", each, "link", "set", "lo", "up")
            _ip("-n", each, "link", "set", "cable", "up")

    def start(self, host: int, *arguments: str, **environment: str) -> Launcher:
        """Starts ``fsdpq`` on a host."""
        output = self._outputs / f"{len(self._launchers)}-on-{host}.txt"
        command = [sys.executable, str(COMMAND), *arguments]
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._names[host], *command],
                cwd=self._project, env=self._environment | environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self._launchers.append(Launcher(process, output))
        return self._launchers[-1]

    def cut(self) -> None:
        """Cuts the cable: packets vanish, and nobody is told."""
        _ip("-n", self._names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("-n", self._names[1], "link", "set", "cable", "up")

    def sent_bytes(self) -> int:
        """Returns the bytes that went over the cable, both ways."""
        line = subprocess.run(
            ["ip", "netns", "exec", self._names[0], "grep", "cable", "/proc/net/dev"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        numbers = line.partition(":")[2].split()
        return int(numbers[0]) + int(numbers[8])

    def end_commands(self) -> None:
        """Kills what still runs."""
        for launcher in self._launchers:
            launcher.kill_all()

    def close(self) -> None:
        """Takes everything away."""
        self.end_commands()
        for each in self._names:
            _ip("netns", "del", each)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    """Waits for something; fails the test where it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)
