"""Jobs for Slurm: the script, run by bash beside stand-ins for Slurm's tools; what these answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.slurm import query
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.job import Job
from fsdpq.launch.slurm.query import JobFacts, query_jobs
from fsdpq.launch.slurm.script import render_script
from fsdpq.launch.slurm.submit import submit
from fsdpq.launch.slurm.training_job import (
    Submission,
    read_setup,
    show_training_job,
    submit_training,
)
from fsdpq.recipe.load import load_recipe, load_resolved
from fsdpq.recipe.sections.launch import SlurmOptions

RECIPE = """\
version: 1
name: mine
model: {name_or_path: meta-llama/Llama-2-7b-hf}
data: {path: rows.jsonl}
optimizer: {kind: adamw, lr: 1e-4}
training: {steps: 3, micro_batch_size: 1}
launch: {scheduler: slurm, nproc_per_node: 4, slurm: {partition: gpu, requeue: true}}
"""


def job(folder: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "name": "mine", "command": ("python", "-m", "fsdpq", "train", "it's.yaml", "$HOME"),
        "options": SlurmOptions(requeue=True), "num_nodes": 1, "ranks_per_node": 2,
        "device": "cpu", "folder": folder / "slurm", "work_dir": folder,
    }  # fmt: skip
    return Job(**(fields | changes))


class Tools:
    """Stand-ins for Slurm's tools, first on the path; they write down how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        self._path = f"{folder}:/usr/bin:/bin"
        monkeypatch.setenv("PATH", self._path)

    def make(self, name: str, body: str) -> None:
        tool = self.folder / name
        tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {self.folder}/{name}.calls\n{body}\n')
        tool.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def run_script(self, script: str, **environment: str) -> int:
        done = subprocess.run(
            ["bash"], input=script, text=True, check=False, capture_output=True,
            env={"PATH": self._path, "SLURM_JOB_ID": "17", **environment},
        )  # fmt: skip
        return done.returncode


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path / "bin", monkeypatch)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


@pytest.mark.parametrize(
    ("code", "state", "restarts", "asks"),
    [
        (75, "RUNNING", "", True),
        (75, "COMPLETING", "", False),  # Slurm queues it again itself, or it was cancelled
        (130, "RUNNING", "4", True),
        (143, "RUNNING", "", True),
        (130, "RUNNING", "5", False),  # stopped before its first step, again and again
        (1, "RUNNING", "", False),
        (0, "RUNNING", "", False),
        (137, "RUNNING", "", False),
    ],
)
def test_only_a_saved_job_is_queued_again(
    tmp_path: Path, tools: Tools, code: int, state: str, restarts: str, asks: bool
) -> None:
    tools.make("srun", f"exit {code}")
    tools.make("scontrol", f'[ "$1" = show ] && echo "JobId=17 JobState={state} Reason=None"')
    script = render_script(job(tmp_path))
    assert tools.run_script(script, SLURM_RESTART_COUNT=restarts) == code
    assert ("requeue" in tools.calls("scontrol")) == asks
    assert tools.calls("srun")[-6:] == ["python", "-m", "fsdpq", "train", "it's.yaml", "$HOME"]


def test_a_job_that_was_cancelled_or_wants_no_requeue_is_not_queued_again(
    tmp_path: Path, tools: Tools
) -> None:
    tools.make("srun", "exit 75")
    tools.make("scontrol", 'echo "JobId=17 JobState=RUNNING Reason=None"')
    mine = job(tmp_path)
    mine.folder.mkdir()
    mine.files.cancelled.touch()
    assert tools.run_script(render_script(mine)) == 75
    plain = render_script(job(tmp_path, options=SlurmOptions()))
    assert tools.run_script(plain) == 75
    assert tools.calls("scontrol") == []
    assert "#SBATCH --no-requeue\n" in plain


def test_several_machines_meet_on_the_first(tmp_path: Path, tools: Tools) -> None:
    tools.make("scontrol", "echo node7; echo node8")
    tools.make("srun", 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=1 "$@"')
    tools.make("python", "exit 3")
    script = render_script(job(tmp_path, num_nodes=2, options=SlurmOptions()))
    environment = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    assert tools.run_script(script, **environment) == 3
    assert tools.calls("scontrol") == ["show", "hostnames", "node[7-8]"]
    assert tools.calls("python")[4:] == [
        "$HOME", "launch.nnodes=2", "launch.rdzv_endpoint=node7:20017", "--node-rank", "1",
    ]  # fmt: skip


def test_what_a_job_asks_for(tmp_path: Path) -> None:
    options = SlurmOptions(
        partition="gpu,long", account="lab", qos="high", constraint="a100&ib", gpus_per_node=8,
        cpus_per_node=64, memory_gib_per_node=500, time_minutes=90, signal_lead_s=300,
    )  # fmt: skip
    asked = directives(render_script(job(tmp_path, device="cuda", options=options, num_nodes=3)))
    del asked["chdir"], asked["output"], asked["comment"]
    assert asked == {
        "job-name": "mine", "open-mode": "append", "nodes": "3", "ntasks-per-node": "1",
        "cpus-per-task": "64", "gres": "gpu:8", "mem": "500G", "partition": "gpu,long",
        "account": "lab", "qos": "high", "constraint": "a100&ib", "time": "90",
        "signal": "USR1@300", "no-requeue": "",
    }  # fmt: skip
    least = directives(render_script(job(tmp_path, device="cuda", num_tasks=5, most_at_once=2)))
    assert (least["gres"], least["cpus-per-task"], least["array"]) == ("gpu:2", "2", "0-4%2")
    assert least["output"].endswith("output-%a.txt")
    assert "gres" not in directives(render_script(job(tmp_path)))


def test_paths_are_quoted_or_refused(tmp_path: Path) -> None:
    asked = directives(render_script(job(tmp_path / 'a "b" %j\\ $c')))
    assert asked["output"].endswith('a \\"b\\" %%j\\\\ $c/slurm/output.txt"')
    with pytest.raises(UsageError, match="cannot be told to Slurm"):
        render_script(job(tmp_path / "a\nb"))


@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", "a b", "$(id)", "-x", "a;b", "a'b"])
@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint"])
def test_a_recipe_brings_no_shell(field: str, value: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        SlurmOptions.model_validate({field: value})


def test_submitting_keeps_the_number_and_what_was_asked(tmp_path: Path, tools: Tools) -> None:
    tools.make("sbatch", 'echo "welcome to the cluster"; echo "17;east"')
    mine = job(tmp_path)
    assert submit(mine) == 17
    mine.files.cancelled.touch()
    tools.make("sbatch", "echo 18")
    assert submit(mine) == 18
    record = read_record(mine.files)
    assert record is not None
    assert (record.id, record.earlier, record.slurm_options.requeue) == (18, [17], True)
    assert not mine.files.cancelled.exists()
    assert mine.files.script.read_text() == render_script(mine)
    assert tools.calls("sbatch")[-1] == str(mine.files.script)


def test_slurms_refusals_are_told_in_its_words(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without_slurm:
        without_slurm.setenv("PATH", str(tools.folder))
        with pytest.raises(EnvironmentProblemError, match="Slurm's `sbatch` cannot be run: No su"):
            submit(job(tmp_path))
    tools.make("sbatch", "echo 'sbatch: error: invalid account: x' >&2; exit 1")
    with pytest.raises(EnvironmentProblemError, match="refuses the job: invalid account: x"):
        submit(job(tmp_path))
    tools.make("sbatch", "echo Thank you")
    with pytest.raises(EnvironmentProblemError, match="gave no number of a job: Thank you"):
        submit(job(tmp_path))
    tools.make("squeue", "echo 'squeue: error: Unable to contact controller' >&2; exit 1")
    with pytest.raises(EnvironmentProblemError, match="no answer: Unable to contact"):
        query_jobs([3])


def test_what_squeue_forgot_sacct_knows_and_what_both_forgot_is_unknown(tools: Tools) -> None:
    rows = ("7|N/A|PENDING|Priority||1:00:00|2026-11-27T12:00:00",
            "8|2|RUNNING|None|n[1-2]|59:00|N/A", "9|N/A|CANCELLED by 0|None||0:00|N/A")  # fmt: skip
    tools.make("squeue", "\n".join(f"echo '{row}'" for row in rows))
    tools.make("sacct", "echo '10|TIMEOUT|n3|2026-11-27T11:00:00'; echo '11_4|FAILED|n3|Unknown'")
    found = {each.id: each for each in query_jobs([11, 7, 8, 9, 10, 12])}
    assert found[7].text == "job 7 waits (Priority), starts 2026-11-27T12:00:00"
    assert (found[8].phase, found[8].text) == ("running", "job 8_2 on n[1-2]")
    assert (found[9].phase, found[10].phase, found[10].state) == ("ended", "ended", "TIMEOUT")
    assert (found[11].task, found[11].starts) == (4, "")
    assert found[12] == JobFacts(12, "unknown", "")
    assert "--jobs=10,11,12" in tools.calls("sacct")
    assert query.phase_of("COMPLETING") == "running"
    tools.make("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    tools.make("sacct", "exit 1")
    assert query_jobs([5]) == [JobFacts(5, "unknown", "")]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "there" / "mine.yaml"
    path.write_text(RECIPE)
    return path


class Silent:
    def report(self, message: str) -> None:
        """Says nothing."""


def test_a_run_is_frozen_where_it_is_submitted(tmp_path: Path, tools: Tools, recipe: Path) -> None:
    tools.make("sbatch", "echo 17")
    loaded = load_recipe(recipe, ("training.steps=9",))
    files, number = submit_training(loaded, Submission(), screen=Silent())  # type: ignore[arg-type]
    assert number == 17
    own = JobFiles.of(files.root)
    assert {path.name for path in files.root.iterdir()} == {"slurm"}
    frozen = load_resolved(own.recipe)
    assert (frozen.training.steps, frozen.launch.scheduler) == (9, "local")
    assert frozen.launch.slurm == SlurmOptions()
    assert load_recipe(own.recipe, base_dir=recipe.parent).recipe == frozen
    script = own.script.read_text()
    command = [line.strip() for line in script.partition("command=(")[2].splitlines()]
    assert command[2:11] == [
        "-m", "fsdpq", "train", str(own.recipe.absolute()), "--base-dir", str(recipe.parent),
        "--run-dir", str(files.root.absolute()), "checkpoint.resume=auto",
    ]  # fmt: skip
    assert directives(script)["gres"] == "gpu:4"
    second, _ = submit_training(loaded, Submission(), screen=Silent())  # type: ignore[arg-type]
    assert second.root != files.root


def test_a_refused_run_leaves_no_directory_and_one_that_goes_on_is_kept(
    tmp_path: Path, tools: Tools, recipe: Path
) -> None:
    tools.make("sbatch", "exit 1")
    loaded = load_recipe(recipe)
    run_dir = tmp_path / "run"
    with pytest.raises(EnvironmentProblemError):
        submit_training(loaded, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    assert not run_dir.exists()
    assert "run/slurm/recipe.yaml" in show_training_job(loaded, Submission(), run_dir=run_dir)
    assert not run_dir.exists()

    tools.make("sbatch", "echo 17")
    submit_training(loaded, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    (run_dir / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="exists and is not empty"):
        submit_training(loaded, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    again = load_recipe(recipe, ("checkpoint.resume=auto",))
    tools.make("squeue", "echo '17|N/A|PENDING|Priority||1:00|N/A'")
    with pytest.raises(UsageError, match="has a job already: job 17 waits"):
        submit_training(again, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    tools.make("squeue", "echo '17|N/A|TIMEOUT|None||0:00|N/A'")
    tools.make("sbatch", "exit 1")
    with pytest.raises(EnvironmentProblemError):
        submit_training(again, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    assert (run_dir / "checkpoints").is_dir()
    tools.make("sbatch", "echo 18")
    _, number = submit_training(again, Submission(), screen=Silent(), run_dir=run_dir)  # type: ignore[arg-type]
    assert number == 18
    assert json.loads(JobFiles.of(run_dir).record.read_text())["earlier"] == [17]


def test_lines_of_shell_come_from_the_user(tmp_path: Path, recipe: Path) -> None:
    assert read_setup(None) == ""
    own = tmp_path / "config" / "fsdpq" / "slurm-setup.sh"
    own.parent.mkdir(parents=True)
    own.write_text("module load cuda\n")
    script = show_training_job(load_recipe(recipe), Submission())
    assert script.index("module load cuda\n") < script.index("command=(")
    other = tmp_path / "other.sh"
    other.write_text("source env/bin/activate\n")
    script = show_training_job(load_recipe(recipe), Submission(setup=other))
    assert "source env" in script
    assert "module load" not in script
    with pytest.raises(UsageError, match=r"missing.sh` cannot be read: No such file"):
        read_setup(tmp_path / "missing.sh")
