"""``fsdpq status``, ``logs`` and ``cancel`` over run directories that a test wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.told_runs import START, ToldRun

from fsdpq.cli.main import main
from fsdpq.cli.runs.status_text import duration
from fsdpq.errors import ExitCode
from fsdpq.launch import cancel as cancel_module
from fsdpq.launch.runs import status as status_module
from fsdpq.launch.runs.log_files import LogTail, last_lines
from fsdpq.launch.runs.pace import seconds_left
from fsdpq.launch.runs.status import read_status
from fsdpq.launch.slurm import cancel as job_cancel
from fsdpq.launch.slurm import run_jobs
from fsdpq.launch.slurm.files import JobFiles, JobRecord, write_record
from fsdpq.launch.slurm.query import JobFacts
from fsdpq.run_files.sweep_paths import SweepFiles

WAIT = "print('up', flush=True); time.sleep(60)"
DUTIFUL = f"import signal, time; signal.signal(15, lambda *_: exit(0)); {WAIT}"
DEAF = f"import signal, time; signal.signal(15, signal.SIG_IGN); {WAIT}"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def give_job(told: ToldRun, number: int, output: str = "") -> None:
    own = JobFiles.of(told.files.root)
    own.folder.mkdir()
    own.recipe.touch()
    write_record(own, JobRecord(number, "mine", START))
    own.output.write_text(output)


def at_work(told: ToldRun) -> ToldRun:
    """Makes this process the launcher of a run that trains."""
    told.now = time.time()
    return told.launch(pid=os.getpid()).phase("train")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``runs/``: one that waits as a job, one that trains as one, two that ended."""
    monkeypatch.chdir(tmp_path)
    facts = [
        JobFacts(7, "queued", "PENDING", "Priority"), JobFacts(8, "running", "RUNNING", "", "n1"),
        JobFacts(9, "ended", "FAILED"),
    ]  # fmt: skip
    asked: list[int] = []

    def query(numbers: list[int]) -> list[JobFacts]:
        asked.extend(numbers)
        return facts

    monkeypatch.setattr(run_jobs, "query_jobs", query)
    waits = ToldRun(tmp_path / "runs" / "waits")
    give_job(waits, 7)
    waits.files.resolved.unlink()
    trains = ToldRun(tmp_path / "runs" / "trains").launch().phase("data", "load", "train")
    give_job(trains.step(1, 2, 3).eval(3, 2.5).checkpoint(2), 8)
    give_job(
        ToldRun(tmp_path / "runs" / "broke"), 9, "loading\nslurmstepd: error: no such disk\n\n"
    )
    done = ToldRun(tmp_path / "runs" / "done").launch(ended=START + 9, exit_code=0)
    give_job(done.phase("train").step(10), 6)
    return tmp_path / "runs"


def test_without_a_name_status_lists_what_is_on_its_way(
    capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    code, out, _ = run(capsys, "status")
    assert code == 0
    assert out.splitlines() == [
        "run          state    step  loss    where",
        "runs/trains  running  3/10  3.3333  Slurm job 8 on n1",
        "runs/waits   queued   0/?           Slurm job 7 waits (Priority)",
        "2 other runs are not on their way: `fsdpq runs ls` lists them",
    ]


def test_status_of_one_run_says_all_of_it(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    _, out, _ = run(capsys, "status", "runs/trains", "runs/broke")
    assert [line.split(maxsplit=1) for line in out.splitlines() if "wrote" not in line] == [
        ["runs/trains"],
        ["state", "running, train (Slurm job 8 on n1)"],
        ["step", "3 of 10, about 7 s left"],
        ["loss", "3.3333 training, 2.5000 held out"],
        ["saved", "at step 2"],
        ["runs/broke"],
        ["state", "failed"],
        ["error", "job 9 is failed: slurmstepd: error: no such disk"],
    ]
    _, out, _ = run(capsys, "status", "runs/waits", "--json")
    [found] = json.loads(out)
    assert (found["state"], found["where"]) == ("queued", "Slurm job 7 waits (Priority)")
    code, _, err = run(capsys, "status", "runs")
    assert code == ExitCode.RECIPE
    assert "`runs` is no run directory" in err


def test_slurm_is_not_asked_about_finished_runs_and_may_be_silent(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(numbers: list[int]) -> list[JobFacts]:
        assert numbers == [7]
        raise run_jobs.EnvironmentProblemError("Slurm gives no answer")

    monkeypatch.setattr(run_jobs, "query_jobs", refuse)
    code, out, _ = run(capsys, "status", "runs/waits", "runs/done", "--json")
    assert code == 0
    assert [found["state"] for found in json.loads(out)][1] == "finished"
    files = ToldRun(runs / "new").files
    monkeypatch.setattr(
        run_jobs, "query_jobs", lambda numbers: pytest.fail("asked") if numbers else []
    )
    assert run_jobs.jobs_of([files])(files) is None


def test_pace_is_that_of_the_last_steps(tmp_path: Path) -> None:
    told = at_work(ToldRun(tmp_path / "run", total_steps=1000))
    assert seconds_left(read_status(told.files)) is None
    told.now += 500  # the first steps were slow
    told.step(1)
    told.now += 500
    told.step(*range(2, 101))
    stands = read_status(told.files)
    assert stands.state == "running"
    left = seconds_left(stands)
    assert left is not None
    assert left == pytest.approx(900, rel=0.05)
    told.launch(ended=told.now, exit_code=75)
    assert seconds_left(read_status(told.files)) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.9, "59 s"), (61, "1 min"), (7500, "2 h 5 min"), (200_000, "2 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_logs_show_the_end_of_everything(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    logs = runs / "broke" / "logs"
    (logs / "torchrun.log").write_text("torchrun\n")
    (logs / "rank-10.log").write_text("ten\n")
    (logs / "rank-2.log").write_text("one\ntwo\n10%\r50%\r100%\nthe \x1b[2Jlast")
    _, out, _ = run(capsys, "logs", "runs/broke", "-n", "2")
    assert out == (
        "==> slurm/output.txt <==\nslurmstepd: error: no such disk\n\n"
        "\n==> logs/torchrun.log <==\ntorchrun\n"
        "\n==> logs/rank-2.log <==\n100%\nthe ␛[2Jlast\n"
        "\n==> logs/rank-10.log <==\nten\n"
    )
    _, out, _ = run(capsys, "logs", "runs/broke", "--rank", "10")
    assert out == "ten\n"
    code, _, err = run(capsys, "logs", "runs/broke", "--rank", "1")
    assert code == ExitCode.RECIPE
    assert "it has logs of the ranks 2, 10" in err
    assert run(capsys, "logs", "runs/waits")[1] == ""


def test_last_lines_of_a_large_file_read_no_more_than_they_need(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50_000)))
    assert last_lines(path, 2) == (["line 49998", "line 49999"], path.stat().st_size)
    assert last_lines(path, 0)[0] == []
    assert last_lines(path, 60_000)[0][0] == "line 0"
    path.write_text("")
    assert last_lines(path, 5) == ([], 0)


def test_following_reads_whole_lines_and_starts_again_where_a_log_did(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a\nb")
    tail = LogTail({path: 2})
    assert list(tail.read_new([path])) == []
    with path.open("a") as file:
        file.write("c\nd\ne")
    assert list(tail.read_new([path])) == [(path, ["bc", "d"])]
    path.write_text("new\n")
    assert list(tail.read_new([path, tmp_path / "missing"])) == [(path, ["new"])]


def test_follow_ends_with_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsdpq.cli.runs.jobs._LOOK_S", 0.1)
    monkeypatch.setattr("fsdpq.cli.runs.jobs._POLL_S", 0.02)
    told = at_work(ToldRun(tmp_path / "run"))
    log = told.files.rank_log(0)
    log.write_text("first\n")

    def go_on() -> None:
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("second\n")
        told.launch(ended=time.time(), exit_code=0)

    writer = threading.Thread(target=go_on)
    writer.start()
    code, out, err = run(capsys, "logs", str(told.files.root), "--follow", "--rank", "0")
    writer.join()
    assert (code, out) == (0, "first\nsecond\n")
    assert err.startswith(f"running: process {os.getpid()} on ")


def start_launcher(code: str) -> subprocess.Popen[str]:
    """Starts a process that has said that it is ready for signals."""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    return launcher


def test_cancel_tells_the_launcher_of_this_machine_and_waits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ToldRun(tmp_path / "run")
    launcher = start_launcher(DUTIFUL)
    told.launch(pid=launcher.pid, time=time.time()).phase("train").step(1, 2, 3).checkpoint(3)
    code, out, err = run(capsys, "cancel", str(told.files.root))
    launcher.communicate()
    assert (code, launcher.returncode) == (0, 0)
    assert f"process {launcher.pid} is told to save and end" in err
    root = told.files.root
    assert (
        out == f"`{root}` ended after step 3 of 10; go on from step 3 with `fsdpq resume {root}`\n"
    )

    code, _, err = run(capsys, "cancel", str(root))
    assert code == ExitCode.RECIPE
    assert f"nothing is at work in `{root}`" in err
    monkeypatch.setattr(status_module, "SILENCE_S", 1e12)
    told.launch(host="elsewhere", time=time.time())
    code, _, err = run(capsys, "cancel", str(root))
    assert code == ExitCode.RECIPE
    assert "give the command on elsewhere" in err


def test_a_launcher_that_does_not_end_in_time_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ToldRun(tmp_path / "run")
    launcher = start_launcher(DEAF)
    told.launch(pid=launcher.pid, time=time.time()).phase("train")

    class Silent:
        def report(self, message: str) -> None:
            """Says nothing."""

    with pytest.raises(cancel_module.LaunchError, match="has not ended within 0 s"):
        cancel_module.cancel_run(told.files, screen=Silent(), patience_s=0.3)  # type: ignore[arg-type]
    assert launcher.poll() is None
    launcher.kill()
    launcher.communicate()


def test_cancel_of_a_sweep_ends_its_array(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [
        JobFacts(5, "running", "RUNNING", "", "n1", "", "", 0),
        JobFacts(5, "queued", "PENDING"),
    ]
    told: list[str] = []

    def run_tool(command: list[str]) -> subprocess.CompletedProcess[str]:
        told.append(" ".join(command))
        alive.clear()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(job_cancel, "query_jobs", lambda _: list(alive))
    monkeypatch.setattr(job_cancel, "run_tool", run_tool)
    sweep = SweepFiles(tmp_path / "sweep")
    own = JobFiles.of(sweep.root)
    own.folder.mkdir(parents=True)
    sweep.spec.touch()
    write_record(own, JobRecord(5, "mine", START, num_tasks=9))
    code, out, _ = run(capsys, "cancel", str(sweep.root))
    assert (code, told) == (0, ["scancel --state=PENDING 5", "scancel --signal=USR1 5"])
    assert out.startswith(f"`{sweep.root}`: 2 tasks of job 5 ended")
    assert own.cancelled.exists()
    code, _, err = run(capsys, "cancel", str(sweep.root))
    assert code == ExitCode.RECIPE
    assert "no job of" in err
