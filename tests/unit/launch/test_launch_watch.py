"""A real torchrun with two ranks that beat and need no torch: hangs, and signals for all."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from fsdpq.errors import LaunchError
from fsdpq.launch.ranks import watch
from fsdpq.launch.ranks.keeper import SAVING, RunKeeper
from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.launch.ranks.stacks import Frame, RankStack
from fsdpq.launch.ranks.torchrun import run_torchrun
from fsdpq.launch.ranks.watch import Hang, HangWatch, explain_hang
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.run_files.beats import Beat
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.checkpoint_manifest import step_directory
from fsdpq.worker.keeping.heartbeat import Heartbeat

WORKER = (str(Path(__file__).with_name("hanging_worker.py")),)
OPTIONS = LaunchOptions(nproc_per_node=2, device="cpu")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "logs").mkdir()
    return RunFiles(tmp_path)


def keeper(files: RunFiles, reported: list[str], limit_s: float | None = None) -> RunKeeper:
    return RunKeeper(files, HangWatch(files, 2, limit_s), reported.append)


@pytest.mark.parametrize(
    ("mode", "place"),
    [("stopped", "it is stopped (SIGSTOP)"), ("spin", f"`spin` ({WORKER[0]}:")],
)
def test_a_rank_that_hangs_is_named(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, mode: str, place: str
) -> None:
    monkeypatch.setenv("FAKE_MODE", mode)
    with pytest.raises(LaunchError) as caught:
        run_torchrun(
            files, OPTIONS, on_row=lambda _: None, worker=WORKER, keeper=keeper(files, [], 3.0)
        )
    assert caught.value.message.startswith(
        "the ranks hang: none has got further for 3 s; rank 1 is stuck in the backward pass of "
        f"step 3: {place}"
    )
    assert "rank 0: in the optimizer of step 3, `<module>`" in caught.value.details
    assert not psutil.pid_exists(Beat.unpack(files.heartbeat(1).read_bytes()).pid)


def test_signals_for_every_process_of_a_job_end_no_rank(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals launcher, torchrun and ranks: the ranks get to know, and end by themselves."""
    monkeypatch.setenv("FAKE_MODE", "signals")
    reported: list[str] = []
    kept = keeper(files, reported)
    kept.take({"event": "phase", "name": "train"})

    def signal_all() -> None:
        while not (files.heartbeat(0).exists() and files.heartbeat(1).exists()):
            time.sleep(0.02)
        time.sleep(0.2)
        # Of this run alone: this process has the ranks of other tests, which are to live on.
        everyone = [
            process
            for process in psutil.Process().children(recursive=True)
            if str(files.root) in process.cmdline()
        ]
        assert len(everyone) == 3
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for process in everyone:
                process.send_signal(number)
            os.kill(os.getpid(), number)

    threading.Thread(target=signal_all, daemon=True).start()
    code, stopped_by = run_torchrun(
        files, OPTIONS, on_row=lambda _: None, worker=WORKER, keeper=kept
    )
    assert (code, stopped_by) == (0, ""), files.torchrun_log.read_text()
    assert reported == [SAVING]
    assert files.stop_request.read_text() == "SIGUSR1"
    assert {(files.root / f"signal-{rank}").read_text() for rank in (0, 1)} <= {
        "SIGUSR1",
        "SIGTERM",  # of two that are pending the system delivers the one with the lower number
    }


def test_before_training_nothing_is_asked_for(files: RunFiles) -> None:
    reported: list[str] = []
    kept = keeper(files, reported)
    kept.take({"event": "phase", "name": "load"})
    assert not kept.ask_to_end("SIGTERM")
    assert not files.stop_request.exists()
    kept.take({"event": "phase", "name": "train"})
    assert kept.ask_to_end("SIGTERM")
    assert kept.ask_to_end("SIGTERM")
    assert reported == [SAVING]


@pytest.mark.parametrize(
    ("signals", "insists", "in_a_job"),
    [
        ([("SIGTERM", 0.0), ("SIGTERM", 0.01)], False, False),  # on two ways at once
        ([("SIGUSR1", 0.0), ("SIGTERM", 60.0)], False, False),  # Slurm, later, while it saves
        ([("SIGTERM", 0.0), ("SIGTERM", 5.0)], True, False),
        ([("SIGTERM", 0.0), ("SIGTERM", 60.0)], False, True),  # the end of its grace time
        ([("SIGTERM", 0.0), ("SIGINT", 60.0)], True, True),
        ([("SIGUSR1", 0.0), ("SIGINT", 5.0)], True, False),
    ],
)
def test_a_wish_is_repeated_or_only_comes_twice(
    signals: list[tuple[str, float]],
    insists: bool,
    in_a_job: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_a_job:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stop = StopSignals()
    for name, at in signals:
        stop.received.append(getattr(signal, name))
        stop.times.append(at)
    assert stop.insists == insists
    assert stop.name == signals[0][0]


@pytest.mark.parametrize(
    ("saved", "older", "line", "code"),
    [
        (True, 0, "stopped by SIGTERM after step 41 of 100; saved: go on from step 41 with", 75),
        (False, 30, "after step 41 of 100, which could not be saved; go on from step 30 with", 75),
        (False, 0, "could not be saved, and there is no checkpoint; its metrics and logs", 130),
    ],
)
def test_the_last_line_says_how_to_go_on(
    files: RunFiles, saved: bool, older: int, line: str, code: int
) -> None:
    kept = keeper(files, [])
    assert kept.stopped(100) is None
    step = 41 if saved else older
    if step:
        step_directory(files.checkpoints, step).mkdir(parents=True)
    kept.take({"event": "stop", "signal": "SIGTERM"})
    directory = "somewhere" if saved else None
    kept.take({"event": "stopped", "step": 41, "directory": directory})
    error = kept.stopped(100)
    assert error is not None
    assert line in error.message
    assert error.exit_code == code
    assert (f"`fsdpq resume {files.root}`" in error.message) == (code == 75)


def test_a_disk_that_is_gone_is_told_once(files: RunFiles, clock: list[float]) -> None:
    reported: list[str] = []
    kept = keeper(files, reported)
    files.root.rename(files.root.with_name("elsewhere"))
    for _ in range(5):
        clock[0] += 3
        kept.check()
    assert len(reported) == 1
    assert reported[0].startswith(f"the run directory `{files.root}` is gone: training goes on")


def beating(files: RunFiles) -> tuple[HangWatch, list[Heartbeat]]:
    looks = HangWatch(files, 2, "auto")
    hearts = [Heartbeat(files.heartbeat(rank)) for rank in (0, 1)]
    return looks, hearts


def pass_time(looks: HangWatch, clock: list[float], seconds: float) -> None:
    for _ in range(round(seconds * 2)):
        clock[0] += 0.5
        looks.check()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [time.monotonic()]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        watch, "ask_stacks", lambda _files, pids: {rank: RankStack("", ()) for rank in pids}
    )
    return now


def test_auto_waits_ten_times_the_longest_pause(files: RunFiles, clock: list[float]) -> None:
    looks, hearts = beating(files)
    for heart in hearts:
        heart.enter("train")
        heart.beat("forward", 1)
    pass_time(looks, clock, 1500)  # the first step may compile
    for step in (2, 3):
        for heart in hearts:
            heart.beat("forward", step)
        pass_time(looks, clock, 20)
    hearts[0].beat("backward")
    pass_time(looks, clock, 195)
    with pytest.raises(LaunchError, match=r"none has got further for 20[01] s"):
        pass_time(looks, clock, 10)


def test_saving_and_other_phases_take_their_time(files: RunFiles, clock: list[float]) -> None:
    looks, hearts = beating(files)
    for part, step in (("forward", 1), ("forward", 2), ("save", 2)):
        for heart in hearts:
            heart.enter("train")
            heart.beat(part, step)
        pass_time(looks, clock, 2)
    pass_time(looks, clock, 1700)
    for heart in hearts:
        heart.enter("export")
    pass_time(looks, clock, 1700)
    with pytest.raises(LaunchError, match="in the phase `export`"):
        pass_time(looks, clock, 200)


def test_time_in_which_the_launcher_slept_does_not_count(
    files: RunFiles, clock: list[float]
) -> None:
    looks, hearts = beating(files)
    for step in (1, 2):
        for heart in hearts:
            heart.enter("train")
            heart.beat("forward", step)
        pass_time(looks, clock, 1)
    for _ in range(50):
        clock[0] += 3600.0
        looks.check()


def test_no_limit_waits_for_ever(files: RunFiles, clock: list[float]) -> None:
    looks = HangWatch(files, 2, None)
    for rank in (0, 1):
        Heartbeat(files.heartbeat(rank)).enter("train")
    pass_time(looks, clock, 4000)


def test_ranks_that_all_wait_accuse_nobody(files: RunFiles) -> None:
    frame = Frame("/x/site-packages/torch/distributed/c10d.py", 7, "all_reduce")
    stacks = {rank: RankStack("", (frame,)) for rank in (0, 1)}
    beats = {rank: Beat(1, 5 + rank, 2, "train", "forward") for rank in (0, 1)}
    error = explain_hang(files, Hang(beats, stacks, 61))
    assert "all of them wait for each other" in error.message
    assert "stuck" not in error.message
