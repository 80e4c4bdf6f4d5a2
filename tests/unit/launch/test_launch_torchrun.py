"""A real torchrun with two fake ranks: ends, failures, stops, and no orphans."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fsdpq.errors import EnvironmentProblemError, FsdpqError
from fsdpq.launch.ranks import processes
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.torchrun import JsonLinesTail, check_endpoint, run_torchrun
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, BaseManifest, write_manifest

WORKER = (str(Path(__file__).with_name("fake_worker.py")),)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "logs").mkdir()
    return RunFiles(tmp_path)


def launch(files: RunFiles, mode: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FAKE_MODE", mode)
    rows: list[dict[str, Any]] = []
    options = LaunchOptions(nproc_per_node=2, device="cpu")
    before = count_oom_kills()
    code, stopped_by = run_torchrun(files, options, on_row=rows.append, worker=WORKER)
    return code, stopped_by, rows, before


def explain(
    files: RunFiles, mode: str, monkeypatch: pytest.MonkeyPatch, mapped_base: Path | None = None
) -> FsdpqError:
    code, stopped_by, _, before = launch(files, mode, monkeypatch)
    assert code != 0
    assert stopped_by == ""
    assert_no_orphans(files)
    return explain_failure(files, exit_code=code, oom_kills_before=before, mapped_base=mapped_base)


def assert_no_orphans(files: RunFiles) -> None:
    pids = [int(path.read_text()) for path in files.root.glob("pid-*")]
    assert pids
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_rows_arrive_and_the_ranks_end(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    code, stopped_by, rows, _ = launch(files, "finish", monkeypatch)
    assert (code, stopped_by) == (0, "")
    assert sorted(str(row["event"]) for row in rows) == ["done", "step", "step", "step"]
    assert_no_orphans(files)


def test_traceback_of_the_rank_that_raised_comes_last(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = explain(files, "raise", monkeypatch)
    assert error.message == "rank 1 failed: ValueError: boom"
    assert str(files.rank_log(1)) in error.details
    assert error.details.endswith("ValueError: boom")


def test_error_of_our_own_has_no_traceback(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = explain(files, "own-error", monkeypatch)
    assert (error.message, error.hint) == ("the loss is nan at step 3", "a hint")
    assert error.details == ""


def test_killed_rank_is_named_and_not_its_peer(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = explain(files, "kill", monkeypatch)
    assert error.message.startswith("rank 1 was killed (SIGKILL): ")
    assert "memory" in error.message
    assert "training.micro_batch_size" in error.hint


def test_rank_whose_mapped_base_is_cut_is_explained(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = files.root / "base"
    base.mkdir()
    (base / WEIGHTS_NAME).write_bytes(bytes(10**6))
    manifest = BaseManifest(
        key={}, num_bytes=10**6, chunk_bytes=1 << 20, header_bytes=8, header_sha256="",
        checksums_sha256="", num_parameters=1, num_quantized=0,
    )  # fmt: skip
    write_manifest(base, manifest)
    error = explain(files, "cut", monkeypatch, base)
    assert error.message == (
        f"the base {base} is damaged: {WEIGHTS_NAME} has 100 bytes instead of 1000000; rank 1, "
        "which read it, was killed (SIGBUS)"
    )
    # The base is whole, and something else ended the rank.
    (base / WEIGHTS_NAME).write_bytes(bytes(10**6))
    again = explain_failure(files, exit_code=1, oom_kills_before={}, mapped_base=base)
    assert "whose size is right: a disk that cannot be read" in again.message
    plain = explain_failure(files, exit_code=1, oom_kills_before=count_oom_kills())
    assert plain.message == "rank 1 was killed (SIGBUS)"
    (base / WEIGHTS_NAME).unlink()
    gone = explain_failure(files, exit_code=1, oom_kills_before={}, mapped_base=base)
    assert gone.message.endswith("base.safetensors: No such file or directory")


def test_stop_signal_ends_every_process(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    ready = [files.root / "ready-0", files.root / "ready-1"]
    when(
        lambda: all(path.exists() for path in ready),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    code, stopped_by, rows, _ = launch(files, "stubborn", monkeypatch)
    assert stopped_by == "SIGINT"
    assert code == 0
    assert rows
    assert_no_orphans(files)
    assert len(list(files.root.glob("pid-child-*"))) == 2


def test_second_signal_does_not_wait(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 60)
    ready = [files.root / "ready-0", files.root / "ready-1"]

    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    when(lambda: all(path.exists() for path in ready), press_twice)
    started = time.monotonic()
    _, stopped_by, _, _ = launch(files, "stubborn", monkeypatch)
    assert stopped_by == "SIGTERM"
    assert time.monotonic() - started < 30  # torchrun's start takes seconds, the grace would be 60
    assert_no_orphans(files)


def test_killed_torchrun_leaves_no_orphans(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_torchrun() -> None:
        time.sleep(1)  # the ranks are noted twice a second
        psutil.Process(int((files.root / "pid-0").read_text())).parent().kill()  # type: ignore[union-attr]

    when((files.root / "ready-1").exists, kill_torchrun)
    code, _, _, before = launch(files, "stubborn", monkeypatch)
    assert code == -signal.SIGKILL
    assert_no_orphans(files)
    error = explain_failure(files, exit_code=code, oom_kills_before=before)
    assert error.message.startswith("torchrun was killed (SIGKILL)")


def test_port_in_use_is_named_before_the_start() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        options = LaunchOptions(nproc_per_node=2, device="cpu", rdzv_endpoint=f"127.0.0.1:{port}")
        with pytest.raises(EnvironmentProblemError, match=f"127.0.0.1:{port} cannot be used"):
            check_endpoint(options)
    check_endpoint(options)


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = JsonLinesTail(path)
    assert list(tail.read_new()) == []
    path.write_text('{"a": 1}\n{"a"')
    assert list(tail.read_new()) == [{"a": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert list(tail.read_new()) == [{"a": 2}]
    path.unlink()  # the directory was removed, and the ranks made it anew
    path.write_text('{"another": 10}\n{"b": 3}\n')
    assert list(tail.read_new()) == [{"another": 10}, {"b": 3}]
    assert list(tail.read_new()) == []


def test_workers_share_the_threads_and_stay_off_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "count_cores", lambda: 9)
    environment = processes.worker_environment(num_ranks=2)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert processes.worker_environment(num_ranks=16)["OMP_NUM_THREADS"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment[processes.LAUNCHER_PID] == str(os.getpid())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.worker_environment(num_ranks=2)["OMP_NUM_THREADS"] == "3"


def test_workers_keep_few_compiled_products_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    environment = processes.worker_environment(num_ranks=2)
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    environment = processes.worker_environment(num_ranks=2)
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "1024"


def test_program_that_cannot_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(FsdpqError, match="cannot be started"):
        processes.ProcessTree([f"{sys.executable}-no"], environment={}, stdout=tmp_path / "log")
