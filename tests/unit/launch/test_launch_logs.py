"""Logs of ranks stay small enough for a disk, while the ranks write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdpq.launch.ranks import logs as module
from fsdpq.launch.ranks.logs import bound_logs
from fsdpq.run_files.paths import RunFiles

WRITER = """
import sys
from pathlib import Path
from fsdpq.worker.guard import redirect_output
redirect_output(Path(sys.argv[1]))
print("first line", flush=True)
for number in range(20_000):
    print(f"warning {number:06d}", flush=True)
Path(sys.argv[1]).with_suffix(".done").touch()
sys.stdin.readline()
print("last line", flush=True)
"""


def test_a_rank_that_warns_for_ever_keeps_the_first_and_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 100_000)
    monkeypatch.setattr(module, "HEAD_BYTES", 1_000)
    monkeypatch.setattr(module, "TAIL_BYTES", 5_000)
    files = RunFiles(tmp_path)
    files.logs.mkdir()
    files.rank_log(1).write_text("short\n")
    log = files.rank_log(0)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(log)], stdin=subprocess.PIPE, env=os.environ
    ) as rank:
        assert rank.stdin is not None
        while not log.with_suffix(".done").exists():
            assert rank.poll() is None
            bound_logs(files)
        bound_logs(files)
        rank.stdin.write(b"\n")
    lines = log.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("first line", "last line")
    assert sum("left out" in line for line in lines) >= 1
    assert all(line[:8] in ("first li", "last lin", "warning ", "[fsdpq l", "") for line in lines)
    assert log.stat().st_size < 120_000 < 20_000 * len("warning 000000\n") // 2
    assert files.rank_log(1).read_text() == "short\n"
