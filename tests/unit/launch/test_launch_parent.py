"""A launcher that another launcher started ends when that one is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdpq.launch.parent import PARENT_PID

CHILD = """
import os, signal, sys, time
from pathlib import Path
from fsdpq.launch.parent import PARENT_PID, end_with_parent
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: ((folder / "asked").touch(), sys.exit()))
end_with_parent()
assert PARENT_PID not in os.environ
(folder / "started").touch()
time.sleep(30)
"""
PARENT = f"""
import os, subprocess, sys, time
environment = os.environ | {{"{PARENT_PID}": str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]], env=environment)
time.sleep(30)
"""


def wait_for(path: Path, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def test_a_killed_parent_asks_its_child_to_end_though_nobody_waited_for_it(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    assert wait_for(tmp_path / "started")
    assert not wait_for(tmp_path / "asked", timeout_s=0.6), "the parent lives"
    parent.kill()
    assert wait_for(tmp_path / "asked"), "a zombie counts as gone"
    parent.wait()


@pytest.mark.parametrize("value", ["", "no number"])
def test_a_process_without_such_a_parent_goes_on(value: str, tmp_path: Path) -> None:
    code = f"import os\nos.environ['{PARENT_PID}'] = {value!r}\n" + CHILD.replace("30", "1")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=30, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "asked").exists()
