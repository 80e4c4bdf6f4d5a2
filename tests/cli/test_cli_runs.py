"""`fsdpq runs ls` and `fsdpq tail`: runs that others have started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest
from click.shell_completion import BashComplete
from support.screens import Lines
from support.terminals import Terminal, shown
from support.told_runs import START, ToldRun

from fsdpq.cli.main import cli, main
from fsdpq.cli.runs.listing import format_age, render_runs
from fsdpq.errors import FsdpqError, RunSavedError
from fsdpq.launch import follow as module
from fsdpq.launch.follow import follow
from fsdpq.launch.runs.listing import find_runs
from fsdpq.launch.runs.ownership import owned
from fsdpq.launch.runs.status import RunJob, read_status
from fsdpq.run_files.paths import RunFiles

GO_ON = "go on from step 1 with `fsdpq resume runs/live`"

Ended = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fsdpq(capsys: pytest.CaptureFixture[str]) -> Ended:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs in ``runs``, one in a sweep."""
    monkeypatch.chdir(tmp_path)
    done = ToldRun(Path("runs/done"), total_steps=3).launch().phase("data", "train")
    done.eval(0, 3.0).step(1, 2, 3).eval(3, 2.0).done(3).launch(ended=done.now, exit_code=0)
    saved = ToldRun(Path("runs/saved")).launch().phase("train").step(1, 2).checkpoint(2)
    saved.launch(ended=saved.now + 60, exit_code=75, error="stopped by SIGTERM after step 2 of 10")
    lost = ToldRun(Path("runs/lost"))
    lost.now += 500
    lost.launch().phase("train").step(1)
    failed = ToldRun(Path("runs/failed")).launch()
    failed.launch(ended=START + 1, exit_code=4, error="the disk of `runs/failed` is full")
    ToldRun(Path("sweeps/x/runs/t1")).launch().phase("train").step(4).eval(4, 1.0)


def test_runs_are_listed_newest_first(fsdpq: Ended) -> None:
    code, out, _ = fsdpq("runs", "ls")
    rows = [line.split()[:7] for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ["run", "state", "step", "loss", "held-out", "best", "size"]
    assert [row[:6] for row in rows[1:]] == [
        ["runs/lost", "lost", "1/10", "10.0000", "-", "-"],
        ["runs/saved", "saved", "2/10", "5.0000", "-", "-"],
        ["runs/done", "finished", "3/3", "3.3333", "2.0000", "2.0000"],
        ["runs/failed", "failed", "-", "-", "-", "-"],
    ]


def test_runs_are_filtered_and_sorted(fsdpq: Ended) -> None:
    _, out, _ = fsdpq("runs", "ls", "--state", "lost", "--state", "saved", "--sort", "name")
    assert [line.split()[0] for line in out.splitlines()] == ["run", "runs/lost", "runs/saved"]
    _, out, _ = fsdpq("runs", "ls", "--sort", "best")
    assert out.splitlines()[1].startswith("runs/done")
    code, out, err = fsdpq("runs", "ls", "--state", "running")
    assert (code, out, err) == (0, "", "there are no runs that are running in runs\n")


def test_a_narrow_terminal_gets_fewer_columns() -> None:
    runs = [read_status(files) for files in find_runs(Path("runs"))]
    headings = {
        width: render_runs(runs, now=START + 9, width=width)[0].split() for width in (None, 60, 20)
    }
    assert headings[None] == [
        "run", "state", "step", "loss", "held-out", "best", "size", "updated",
    ]  # fmt: skip
    assert headings[60] == ["run", "state", "step", "loss", "best", "updated"]
    assert headings[20] == ["run", "state"]


def test_runs_of_a_sweep_and_json(fsdpq: Ended) -> None:
    _, out, _ = fsdpq("runs", "ls", "sweeps/x", "--json")
    (only,) = json.loads(out)
    assert (only["root"], only["state"], only["step"]) == ("sweeps/x/runs/t1", "lost", 4)
    code, out, _ = fsdpq("runs", "ls", "nowhere", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_ages_are_readable() -> None:
    ages = [format_age(0.0, now=now) for now in (20.0, 300.0, 7200.0, 47 * 3600.0, 5 * 86400.0)]
    assert ages == ["now", "5 min ago", "2 h ago", "47 h ago", "5 d ago"]
    assert format_age(None, now=1.0) == "-"


def test_tail_of_a_finished_run_sums_it_up(fsdpq: Ended) -> None:
    code, out, err = fsdpq("tail", "runs/done", "-n", "all")
    assert (code, err) == (0, "")
    assert "held-out loss at step 0: 3.0000" in out
    assert "3 steps in 0:06" in out
    assert "held-out loss  3.0000  2.0000" in out


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("saved", 75, "stopped by SIGTERM after step 2 of 10; go on from step 2 with"),
        ("failed", 4, "error: the disk of `runs/failed` is full\nhint: its logs are in"),
        ("lost", 1, "error: the run was lost: its launcher was killed"),
    ],
)
def test_tail_ends_as_the_run_did(fsdpq: Ended, name: str, code: int, text: str) -> None:
    ended, _, err = fsdpq("tail", f"runs/{name}")
    assert ended == code
    assert text in err


def test_tail_begins_with_the_last_rows(fsdpq: Ended) -> None:
    _, out, _ = fsdpq("tail", "runs/done", "-n", "2", "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["phase", "done"]
    code, _, err = fsdpq("tail", "runs/done", "-n", "x")
    assert (code, "neither a number nor `all`" in err) == (2, True)
    code, _, err = fsdpq("tail", "sweeps")
    assert (code, "`sweeps` is no run directory" in err) == (2, True)


def test_tail_waits_for_a_job_that_waits_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    run = ToldRun(Path("runs/job"))
    answers = iter([RunJob("job 7 waits", waits=True)] * 3 + [RunJob("job 7 on n1", runs=True)])

    def job_of(_: RunFiles) -> RunJob | None:
        job = next(answers, None)
        if job is None:  # it has ended
            run.launch(ended=run.now, exit_code=0)
        elif job.runs:
            run.phase("train").step(1)
        return job

    screen = Lines()
    status = follow(run.files, screen=screen, job_of=job_of)
    assert (status.state, status.step, screen.lines) == ("finished", 1, ["waiting: job 7 waits"])


@contextmanager
def at_work(run: ToldRun, error: FsdpqError) -> Iterator[None]:
    """Has a run for the block, and ends it with an error."""
    with suppress(type(error)), owned(run.files, screen=Lines()):
        yield
        raise error


@contextmanager
def following(run: ToldRun) -> Iterator[tuple[subprocess.Popen[str], TextIO]]:
    """Follows a run from another process, which has shown its first step when the block begins."""
    command = [sys.executable, "-m", "fsdpq", "tail", str(run.files.root)]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"NO_COLOR": "1"},
    ) as process:  # fmt: skip
        try:
            output = process.stdout
            assert output is not None
            assert any("step  1/10" in line for line in iter(output.readline, ""))
            yield process, output
        finally:
            process.kill()


def test_tail_follows_a_run_to_its_end_or_to_ctrl_c() -> None:
    run = ToldRun(Path("runs/live"))
    error = RunSavedError("stopped by SIGTERM after step 1 of 10; saved: go on")
    with ExitStack() as stack:
        with at_work(run, error):
            run.now = time.time()
            run.phase("data", "train").step(1)
            with following(run) as (other, _):
                other.send_signal(signal.SIGINT)
                _, told = other.communicate(timeout=20)
                assert (other.returncode, "the run goes on without this" in told) == (130, True)
            follower, output = stack.enter_context(following(run))
            run.eval(1, 2.0)
            assert output.readline() == "held-out loss at step 1: 2.0000 (perplexity 2.00)\n"
            run.checkpoint(1).event("stopped", step=1, directory="checkpoints/step-00000001")
        out, err = follower.communicate(timeout=20)
    assert "ended after step 1, saved in step-00000001\n\n1 of 10 steps: 64 tokens" in out
    assert (follower.returncode, err) == (75, f"{error.message}; {GO_ON}\n")


def test_tail_fits_a_terminal_that_becomes_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "COLUMNS", "COLAB_RELEASE_TAG", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    run = ToldRun(Path("runs/live"))
    with at_work(run, RunSavedError("stopped")):
        run.now = time.time()
        run.phase("train").step(1, 2)
        terminal = Terminal(["-m", "fsdpq", "tail", "runs/live"], tmp_path, columns=80)
        try:
            line = shown(terminal.wait(r"step 2/10[^\r]*eta 0:08"))[-1]
            bar = "━" * 5 + "─" * 19
            assert line.startswith(f"step 2/10  {bar}  loss 5.0000  640 tokens/s  eta 0:08")
            terminal.resize(40)
            run.step(3)
            line = terminal.wait(r"step 3/10[^\r]*eta 0:07").rpartition("\r")[2]
            assert line == "step 3/10  loss 3.3333  eta 0:07"
            run.eval(3, 2.0)
            terminal.wait(r"held-out loss at step 3.*\n\s*step 3/10.*eta 0:07")
        finally:
            terminal.close()
    assert "\x1b" not in terminal.text
    above, last = shown(terminal.text)[-2:]
    assert above.startswith("held-out loss at step 3: 2.0000 (perplexity 2.00)")
    assert last == "step 3/10  loss 3.3333  eta 0:07"


def test_the_shell_completes_runs() -> None:
    def offered(*words: str) -> list[str]:
        complete = BashComplete(cli, {}, "fsdpq", "_FSDPQ_COMPLETE")
        return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]

    assert offered("tail", "runs/") == ["runs/done", "runs/failed", "runs/lost", "runs/saved"]
    assert offered("resume", "sw") == ["sweeps/x/runs/t1"]
    assert offered("runs", "l") == ["ls"]
    assert "lost" in offered("runs", "ls", "--state", "")
