"""How a run stands, told by its launcher, and where that was killed, by the rows of its ranks."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from support.screens import Lines
from support.told_runs import ToldRun

from fsdpq.errors import LaunchError, RunSavedError, UsageError
from fsdpq.fetch.holds import claim
from fsdpq.launch.runs import status as module
from fsdpq.launch.runs.listing import find_runs
from fsdpq.launch.runs.ownership import owned
from fsdpq.launch.runs.status import RunJob, read_status
from fsdpq.launch.slurm.files import JobFiles


@pytest.fixture
def run(tmp_path: Path) -> ToldRun:
    return ToldRun(tmp_path / "run")


def test_a_finished_run_says_how_far_it_came(run: ToldRun) -> None:
    run.launch().phase("data", "load").event("setup", total_steps=3).phase("train")
    run.step(1).eval(1, 2.5).step(2).eval(2, 2.25).step(3).eval(3, 2.75).done(3)
    run.launch(time=run.now - 20, ended=run.now + 1, exit_code=0)
    found = read_status(run.files)
    assert (found.state, found.name, found.step, found.total_steps) == ("finished", "mine", 3, 10)
    assert (found.train_loss, found.eval_loss, found.best_eval_loss) == (10 / 3, 2.75, 2.25)
    assert found.updated == run.now + 1
    assert found.num_bytes == sum(
        path.stat().st_size for path in run.files.root.rglob("*") if path.is_file()
    )
    assert not found.is_active
    assert json.loads(json.dumps(found.as_json()))["root"] == str(run.files.root)


def test_a_launcher_at_work_is_seen_by_its_lock(run: ToldRun) -> None:
    with owned(run.files, screen=Lines()):
        assert read_status(run.files).state == "starting"
        run.now = time.time()
        run.phase("data", "load")
        assert read_status(run.files).state == "starting"
        run.phase("train").step(1)
        found = read_status(run.files)
        assert (found.state, found.phase) == ("running", "train")
        assert f"process {os.getpid()} on " in found.where
        run.launch(time=run.now - 9)  # a process that is not there: the lock is
        assert read_status(run.files).state == "running"
    assert read_status(run.files).state == "finished"


@pytest.mark.parametrize(
    ("error", "checkpoint", "state"),
    [
        (RunSavedError("stopped by SIGTERM after step 3 of 10"), True, "saved"),
        (KeyboardInterrupt(), False, "stopped"),
        (LaunchError("rank 1 was killed\nwith more lines"), True, "failed"),
        (ZeroDivisionError("a bug"), False, "failed"),
    ],
)
def test_how_a_launcher_ended_is_kept(
    run: ToldRun, error: BaseException, checkpoint: bool, state: str
) -> None:
    if checkpoint:
        run.checkpoint(3)
    with pytest.raises(type(error)), owned(run.files, screen=Lines()):
        raise error
    found = read_status(run.files)
    assert (found.state, found.saved_step) == (state, 3 if checkpoint else None)
    assert found.error
    assert "\n" not in found.error


def test_without_a_launchers_last_word_the_ranks_tell(run: ToldRun) -> None:
    run.launch().phase("data", "train").step(1)
    assert read_status(run.files).state == "lost"
    error = {
        "rank": 1, "kind": "TrainingError", "message": "the loss is not finite\nmore", "hint": "",
        "traceback": "", "exit_code": 1, "time": run.now,
    }  # fmt: skip
    run.files.rank_error(1).write_text(json.dumps(error))
    found = read_status(run.files)
    assert (found.state, found.error) == ("failed", "the loss is not finite")
    run.event("stopped", step=1, directory="checkpoints/step-00000001").checkpoint(1)
    assert read_status(run.files).state == "saved"
    run.phase("data", "train", "export").event("done", steps=10)
    assert read_status(run.files).state == "finished"


def test_steps_that_a_resumed_run_does_again_do_not_count(run: ToldRun) -> None:
    run.launch().phase("train").step(1, 2, 3, 4).eval(4, 0.5).eval(2, 2.0)
    run.event("resume", step=2, directory="d", world_size=1)
    found = read_status(run.files)
    assert (found.step, found.train_loss) == (2, 5.0)
    assert (found.eval_loss, found.best_eval_loss) == (2.0, 2.0)
    run.step(3, loss=float("nan"))
    found = read_status(run.files)
    assert (found.step, found.train_loss) == (3, None)


def test_half_lines_and_texts_that_look_like_rows_are_no_rows(run: ToldRun) -> None:
    run.launch().phase("train").step(1)
    run.event("notice", message='{"event": "done", "steps": 9}')
    with run.files.metrics.open("a") as file:
        file.write('{"event": "step", "step": 9, "total_st')
    found = read_status(run.files)
    assert (found.state, found.step) == ("lost", 1)


def test_where_locks_are_not_seen_the_process_or_its_silence_tells(
    run: ToldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    born = psutil.Process().create_time()
    run.launch(pid=os.getpid(), time=born + 1)
    assert read_status(run.files).state == "starting"
    run.launch(pid=os.getpid(), time=born - 100)  # the number belongs to another process now
    assert read_status(run.files).state == "lost"
    run.launch(host="elsewhere", time=time.time())
    assert read_status(run.files).state == "starting"
    monkeypatch.setattr(module, "SILENCE_S", 0.0)
    assert read_status(run.files).state == "lost"


def test_a_launcher_that_ends_while_somebody_looks_is_not_lost(
    run: ToldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.launch().phase("train").step(1)

    def ends(_: Path) -> bool:
        run.launch(ended=run.now, exit_code=1, error="the loss is not finite")
        return False

    monkeypatch.setattr(module, "is_claimed", ends)
    found = read_status(run.files)
    assert (found.state, found.error) == ("failed", "the loss is not finite")


def test_a_scheduler_knows_better(run: ToldRun) -> None:
    run.launch(ended=run.now, exit_code=75, error="stopped by SIGUSR1").checkpoint(2)
    waiting = read_status(run.files, job_of=lambda _: RunJob("Slurm job 7", waits=True))
    assert (waiting.state, waiting.where, waiting.is_active) == ("queued", "Slurm job 7", True)
    at_work = read_status(run.files, job_of=lambda _: RunJob("Slurm job 7 on n1", runs=True))
    assert (at_work.state, at_work.where) == ("starting", "Slurm job 7 on n1")
    assert read_status(run.files, job_of=lambda _: None).state == "saved"


def test_a_look_at_a_run_keeps_no_launcher_out(
    run: ToldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as look:
        look.enter_context(claim(run.files.root))
        monkeypatch.setattr("fsdpq.launch.runs.ownership.time.sleep", lambda _: look.close())
        with owned(run.files, screen=Lines()):
            assert read_status(run.files).state == "starting"


def test_runs_are_found_in_directories_of_runs_and_of_sweeps(tmp_path: Path) -> None:
    for name in ("runs/b", "runs/a", "sweeps/x/runs/t2", "sweeps/x/runs/t1", "sweeps/y/runs/t3"):
        ToldRun(tmp_path / name)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "sweeps" / "x" / "recipes").mkdir()
    for place in ("sweeps/x", "runs/waits"):  # an array of a sweep; a run that is in the queue
        JobFiles.of(tmp_path / place).folder.mkdir(parents=True)
        JobFiles.of(tmp_path / place).record.write_text("{}")
    JobFiles.of(tmp_path / "runs" / "waits").recipe.touch()

    def names(folder: str) -> list[str]:
        return [files.root.name for files in find_runs(tmp_path / folder)]

    assert names("runs") == ["a", "b", "waits"]
    assert names("runs/a") == ["a"]
    assert names("sweeps/x") == ["t1", "t2"]
    assert names("sweeps") == ["t1", "t2", "t3"]
    with pytest.raises(UsageError, match="there is no directory"):
        find_runs(tmp_path / "nothing")
