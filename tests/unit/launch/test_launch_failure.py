"""Root causes, from logs that torchrun 2.13 really wrote."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fsdpq.errors import ExitCode, FsdpqError
from fsdpq.launch.ranks import failure
from fsdpq.launch.ranks.failure import explain_failure, read_rank_errors, read_torchrun_failures
from fsdpq.run_files.paths import RunFiles

NOW = 1764000000.0
STAMP = time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(NOW))
ENTRY = """\
[{index}]:
  time      : {stamp}
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: {pid}) {name}
  error_file: <N/A>
  traceback : {traceback}
"""
HEAD = """\
W1123 05:30:34.199000 6535 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 6540 closing signal SIGTERM
E1123 05:30:34.201000 6535 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 6541) of binary: /venv/bin/python
Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
fsdpq.worker FAILED
------------------------------------------------------
Failures:
"""  # noqa: E501
PEER = ENTRY.format(
    index=1, stamp=STAMP, rank=0, code=-15, pid=6540, name=" (SIGTERM)",
    traceback="Signal 15 (SIGTERM) received by PID 6540",
)  # fmt: skip


def torchrun_log(code: int, name: str, traceback: str) -> str:
    root = ENTRY.format(
        index=0, stamp=STAMP, rank=1, code=code, pid=6541, name=name, traceback=traceback
    )
    rule = "------------------------------------------------------\n"
    return HEAD.format(code=code) + PEER + rule + "Root Cause (first observed failure):\n" + root


KILLED = torchrun_log(-9, " (SIGKILL)", "Signal 9 (SIGKILL) received by PID 6541")
CRASHED = torchrun_log(-11, " (SIGSEGV)", "Signal 11 (SIGSEGV) received by PID 6541")
RAISED = torchrun_log(1, "", "To enable traceback see: https://pytorch.org/docs/stable/elastic/")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFiles:
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(failure, "count_oom_kills", lambda: {"/proc/vmstat": 3})
    return RunFiles(tmp_path)


def record(files: RunFiles, rank: int, message: str, *, after_s: float, **fields: object) -> None:
    error = {
        "rank": rank, "kind": "RuntimeError", "message": message, "hint": "",
        "traceback": f"Traceback\nRuntimeError: {message}", "exit_code": 1, "time": NOW + after_s,
    }  # fmt: skip
    files.rank_error(rank).write_text(json.dumps({**error, **fields}))


def explain(files: RunFiles, log: str, before: Mapping[str, int] | None = None) -> FsdpqError:
    files.torchrun_log.write_text(log)
    return explain_failure(files, exit_code=1, oom_kills_before=before or {"/proc/vmstat": 3})


def test_log_tells_who_failed_and_who_was_ended(files: RunFiles) -> None:
    files.torchrun_log.write_text(KILLED)
    peer, killed = read_torchrun_failures(files.torchrun_log)
    assert (peer.rank, peer.exit_code, peer.by_torchrun) == (0, -15, True)
    assert (killed.rank, killed.exit_code, killed.by_torchrun) == (1, -9, False)
    assert killed.time == NOW


def test_kill_without_a_count_is_put_as_a_guess(files: RunFiles) -> None:
    error = explain(files, KILLED)
    assert error.message == (
        "rank 1 was killed (SIGKILL): that is how the system ends a process when memory runs out"
    )
    assert "data.seq_len" in error.hint


def test_kill_for_memory_is_confirmed_by_the_kernels_count(files: RunFiles) -> None:
    error = explain(files, KILLED, {"/proc/vmstat": 2})
    assert error.message == (
        "rank 1 was killed (SIGKILL): "
        "memory ran out, the kernel killed one process for it during this run"
    )


def test_peer_that_lost_a_killed_rank_is_not_the_cause(files: RunFiles) -> None:
    record(files, 0, "[gloo] Connection closed by peer [127.0.0.1]:30", after_s=0.2)
    assert explain(files, KILLED).message.startswith("rank 1 was killed")


def test_crash_names_its_signal(files: RunFiles) -> None:
    error = explain(files, CRASHED)
    assert error.message == "rank 1 was killed (SIGSEGV)"


def test_error_before_a_crash_is_the_cause(files: RunFiles) -> None:
    record(files, 0, "index out of range", after_s=-1)
    assert explain(files, CRASHED).message == "rank 0 failed: RuntimeError: index out of range"


def test_earliest_error_that_is_no_lost_connection_wins(files: RunFiles) -> None:
    record(files, 0, "Connection closed by peer", after_s=0.0)
    record(files, 1, "boom", after_s=0.1)
    record(files, 2, "later", after_s=0.2)
    error = explain(files, RAISED)
    assert error.message == "rank 1 failed: RuntimeError: boom"
    assert error.details.endswith("RuntimeError: boom")


def test_own_errors_keep_their_message_hint_and_exit_code(files: RunFiles) -> None:
    message = "`quantization: {kind: bnb}` needs the package `bitsandbytes`"
    record(files, 0, message, after_s=0, traceback="", hint="pip install it", exit_code=4)
    error = explain(files, RAISED)
    assert (error.message, error.hint, error.details) == (message, "pip install it", "")
    assert error.exit_code is ExitCode.ENVIRONMENT


def test_without_any_record_the_logs_speak(files: RunFiles) -> None:
    files.rank_log(1).write_text("something odd\n")
    error = explain(files, "no module named torch\n")
    assert "without a message" in error.message
    assert "no module named torch" in error.details
    assert "something odd" in error.details


def test_torn_record_is_left_out(files: RunFiles) -> None:
    files.rank_error(0).write_text('{"rank": 0, "ki')
    record(files, 1, "boom", after_s=0)
    assert [error.rank for error in read_rank_errors(files)] == [1]


def test_a_full_disk_is_the_cause_whatever_the_ranks_say(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(files, 0, "No space left on device", after_s=0)
    usage = shutil.disk_usage(files.root)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = explain_failure(files, exit_code=1, oom_kills_before={})
    assert error.message == f"the disk of `{files.root}` is full"
    assert error.exit_code == ExitCode.ENVIRONMENT
