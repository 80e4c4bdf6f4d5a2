"""Runs as jobs of a real Slurm: preempted, cancelled, failed, refused; and an array."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.commands import Run
from support.slurm_cluster import SlurmCluster

from fsdpq.errors import ExitCode
from fsdpq.launch.slurm.cancel import cancel_job
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.job import Job
from fsdpq.launch.slurm.query import query_jobs
from fsdpq.launch.slurm.submit import submit
from fsdpq.recipe.sections.launch import SlurmOptions
from fsdpq.run_files.beats import BEAT_LAYOUT, Beat
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

NUM_STEPS = 40
SETTINGS = (
    "optimizer.lr=1e-3", f"training.steps={NUM_STEPS}", "training.eval_interval=16",
    "training.micro_batch_size=2", "export.format=peft", "export.verify=false",
    "launch.nproc_per_node=1",
)  # fmt: skip
SLURM = ("launch.scheduler=slurm", "launch.slurm.requeue=true", "launch.slurm.time_minutes=30")


def losses(files: RunFiles) -> dict[tuple[str, int], float]:
    """Returns the losses that count: of every step and evaluation the last one."""
    rows = read_json_lines(files.metrics)
    return {(row["event"], row["step"]): row["loss"] for row in rows if "loss" in row}


def output(files: RunFiles) -> str:
    path = JobFiles.of(files.root).output
    return path.read_text() if path.exists() else ""


def hold_rank(cluster: SlurmCluster, files: RunFiles, *, after: int) -> psutil.Process:
    """Lets the one rank of a run stand still after a step: what is asked of it comes in time."""

    def beat() -> Beat:
        path = files.heartbeat(0)  # made anew by every start
        content = path.read_bytes() if path.exists() else b""
        return Beat.unpack(content) if len(content) == BEAT_LAYOUT.size else Beat()

    cluster.wait_for(lambda: beat().phase == "train" and beat().step > after)
    rank = psutil.Process(beat().pid)
    rank.suspend()
    assert beat().step < NUM_STEPS
    return rank


def job_of(files: RunFiles) -> int:
    record = read_record(JobFiles.of(files.root))
    assert record is not None
    return record.id


@pytest.fixture(scope="module")
def undisturbed(project: Path, fsdpq: Run, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    files = RunFiles(tmp_path_factory.mktemp("undisturbed") / "run")
    done = fsdpq("train", "recipe.yaml", *SETTINGS, "--run-dir", str(files.root))
    assert done.returncode == 0, done.stderr
    return files


@pytest.fixture(scope="module")
def cancelled(
    cluster: SlurmCluster, project: Path, fsdpq: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFiles, subprocess.CompletedProcess[str]]:
    """A run whose job was cancelled while it trained, and what the command said."""
    files = RunFiles(tmp_path_factory.mktemp("cancelled") / "it's a run")
    recipe = project / "mine.yaml"
    recipe.write_text((project / "recipe.yaml").read_text())
    done = fsdpq("train", recipe.name, *SETTINGS, *SLURM, "--run-dir", str(files.root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(files.root)
    number = job_of(files)
    assert f"submitted job {number}" in done.stderr
    recipe.write_text("this is no recipe any more")
    rank = hold_rank(cluster, files, after=1)
    twice = fsdpq("resume", str(files.root))
    assert twice.returncode == ExitCode.RECIPE
    assert f"has a job already: job {number} on" in twice.stderr
    rank.resume()
    return files, fsdpq("cancel", str(files.root))


def test_a_cancelled_job_saves_and_is_not_queued_again(
    cluster: SlurmCluster,
    fsdpq: Run,
    cancelled: tuple[RunFiles, subprocess.CompletedProcess[str]],
) -> None:
    files, ended = cancelled
    number = job_of(files)
    assert ended.returncode == 0, ended.stderr
    assert f"job {number} is told to save and end" in ended.stderr
    assert "go on from step" in ended.stdout
    assert cluster.state(number) == "FAILED"  # its exit code is that of a saved run
    assert "stopped by SIGUSR1 after step" in output(files)
    assert "queueing the job again" not in output(files)
    printed = fsdpq("logs", str(files.root), "-n", "3").stdout
    assert "==> slurm/output.txt <==" in printed
    assert "==> logs/rank-0.log <==" in printed


def test_it_goes_on_as_a_job_is_preempted_and_ends_as_if_undisturbed(
    cluster: SlurmCluster,
    fsdpq: Run,
    undisturbed: RunFiles,
    cancelled: tuple[RunFiles, subprocess.CompletedProcess[str]],
) -> None:
    files, _ = cancelled
    done = fsdpq("resume", str(files.root), "launch.scheduler=slurm")
    assert done.returncode == 0, done.stderr
    number = job_of(files)
    assert "#SBATCH --time=30\n" in JobFiles.of(files.root).script.read_text()  # as the last one
    rank = hold_rank(cluster, files, after=20)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null",
        "--wrap=sleep 1",
    ).strip()  # fmt: skip
    cluster.wait_for(lambda: output(files).count("saving after this step") == 2)
    rank.send_signal(signal.SIGCONT)
    cluster.wait_for(lambda: cluster.state(number) == "PENDING")
    assert "stopped by SIGTERM after step" in output(files)
    [status] = json.loads(fsdpq("status", str(files.root), "--json").stdout)
    assert status["state"] in ("queued", "starting", "running")
    assert f"Slurm job {number}" in status["where"]

    cluster.wait_for(lambda: cluster.state(number) == "COMPLETED")
    assert cluster.state(int(urgent)) == "COMPLETED"
    starts = [row["step"] for row in read_json_lines(files.events) if row["event"] == "resume"]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < NUM_STEPS
    assert losses(files) == losses(undisturbed)
    name = "adapter_model.safetensors"
    assert (files.adapter / name).read_bytes() == (undisturbed.adapter / name).read_bytes()
    assert fsdpq("status", str(files.root)).stdout.splitlines()[1].split() == ["state", "finished"]


def test_a_job_that_fails_says_why_and_is_not_queued_again(
    cluster: SlurmCluster, project: Path, fsdpq: Run, tmp_path: Path
) -> None:
    files, rows = RunFiles(tmp_path / "run"), project / "other.jsonl"
    rows.write_text((project / "rows.jsonl").read_text())
    done = fsdpq(
        "train", "recipe.yaml", *SETTINGS, *SLURM, "data.path=other.jsonl",
        "--run-dir", str(files.root), "--slurm-setup", "setup.sh",
    )  # fmt: skip
    assert done.returncode == ExitCode.RECIPE
    assert "`setup.sh` cannot be read" in done.stderr
    (project / "setup.sh").write_text(f"export SAID='by the setup'\nrm '{rows}'\n")
    done = fsdpq(
        "train", "recipe.yaml", *SETTINGS, *SLURM, "data.path=other.jsonl",
        "--run-dir", str(files.root), "--slurm-setup", "setup.sh",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = job_of(files)
    cluster.wait_for(lambda: cluster.state(number) == "FAILED")
    [status] = json.loads(fsdpq("status", str(files.root), "--json").stdout)
    assert status["state"] == "failed"
    assert f"job {number} is failed" in status["error"]
    assert "other.jsonl" in fsdpq("logs", str(files.root)).stdout


def test_what_slurm_refuses_leaves_nothing_behind(
    project: Path, fsdpq: Run, tmp_path: Path
) -> None:
    arguments = ("train", "recipe.yaml", *SLURM, "--run-dir", str(tmp_path / "run"))
    done = fsdpq(*arguments, "launch.slurm.partition=none")
    assert done.returncode == ExitCode.ENVIRONMENT
    assert "invalid partition specified: none" in done.stderr
    assert not (tmp_path / "run").exists()
    shown = fsdpq(*arguments, "--print")
    assert shown.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=shown.stdout, text=True, check=True)


def test_an_array_runs_its_tasks_and_can_be_cancelled(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    tell = "echo task $SLURM_ARRAY_TASK_ID of '%j' \"$@\"; trap 'exit 75' USR1; sleep $1 & wait"
    job = Job(
        name="array",
        command=("bash", "-c", tell, "bash", "0"),
        options=SlurmOptions(requeue=True),
        num_nodes=1,
        ranks_per_node=1,
        device="cpu",
        folder=tmp_path / "100%j" / "slurm",
        work_dir=tmp_path,
        num_tasks=2,
    )
    number = submit(job)
    cluster.wait_for(lambda: {each.phase for each in query_jobs([number])} == {"ended"})
    assert {(each.task, each.state) for each in query_jobs([number])} == {
        (0, "COMPLETED"), (1, "COMPLETED"),
    }  # fmt: skip
    texts = [path.read_text() for path in job.files.outputs]
    assert texts == ["task 0 of %j 0\n", "task 1 of %j 0\n"]

    one_at_a_time = {"command": ("bash", "-c", tell, "bash", "60"), "most_at_once": 1}
    number = submit(Job(**(vars(job) | one_at_a_time)))
    assert read_record(job.files).earlier  # type: ignore[union-attr]
    cluster.wait_for(lambda: len(job.files.outputs[0].read_text().splitlines()) == 2)
    started = time.monotonic()
    said: list[str] = []
    assert cancel_job(job.files, number, report=said.append, patience_s=20)
    assert time.monotonic() - started < 15
    assert said == [f"job {number} is out of the queue", f"job {number} is told to save and end"]
    assert {(each.task, each.state) for each in query_jobs([number])} == {
        (0, "FAILED"), (1, "CANCELLED"),
    }  # fmt: skip
