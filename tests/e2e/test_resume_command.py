"""Going on with a run from the command line: after a kill, elsewhere, changed, and by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from support.commands import Run

from fsdpq.launch.runs.status import read_status
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints, step_of

pytestmark = pytest.mark.usefixtures("project")

STEPS = 24
# The recipe's learning rate of 1e-2 makes a run where the order of a sum matters after some steps:
# two undisturbed runs, on one rank and on two, then differ by 2e-2 at the end. With this by 2e-7.
SETTINGS = (
    "optimizer.lr=1e-3", "checkpoint.interval=4", "training.eval_interval=8",
    "training.micro_batch_size=2", "export.format=peft",
)  # fmt: skip


def command(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command line and returns at once."""
    environment = {"NO_COLOR": "1", "FSDPQ_CACHE": str(project.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "fsdpq", *arguments],
        cwd=project, env=os.environ | environment,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks_of(files: RunFiles) -> list[psutil.Process]:
    """Returns the ranks that are at work in a run directory, by their number."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if (
            "fsdpq.worker" in line
            and str(files.root) in line
            and "torch.distributed.run" not in line
        ):
            found[process.environ()["RANK"]] = process
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def list_steps(files: RunFiles) -> list[int]:
    return [step_of(directory) for directory in list_checkpoints(files.checkpoints)]


def has_saved(files: RunFiles, step: int) -> Callable[[], bool]:
    return lambda: (
        bool(list_checkpoints(files.checkpoints))
        and (int(list_checkpoints(files.checkpoints)[0].name.removeprefix("step-")) >= step)
    )


def losses(files: RunFiles) -> dict[tuple[str, int], float]:
    """Returns the losses that count: of every step and evaluation the last one."""
    rows = read_json_lines(files.metrics)
    return {(row["event"], row["step"]): row["loss"] for row in rows if "loss" in row}


def same_adapters(files: RunFiles, other: RunFiles) -> bool:
    name = "adapter_model.safetensors"
    return (files.adapter / name).read_bytes() == (other.adapter / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    files = RunFiles(tmp_path_factory.mktemp("undisturbed") / "run")
    process = command(project, "train", "recipe.yaml", "--run-dir", str(files.root), *SETTINGS)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    assert len(losses(files)) == STEPS + 4
    return files


@pytest.fixture(scope="module")
def killed(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunFiles, RunFiles]]:
    """A run whose launcher was killed and whose ranks stand still, and a copy of its directory."""
    files = RunFiles(tmp_path_factory.mktemp("killed") / "run")
    process = command(project, "train", "recipe.yaml", "--run-dir", str(files.root), *SETTINGS)
    wait_for(has_saved(files, 8), process)
    ranks = ranks_of(files)
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    copy = RunFiles(files.root.with_name("copy"))
    shutil.copytree(files.root, copy.root)
    yield files, copy
    for rank in ranks:
        if rank.is_running():
            rank.kill()


def test_a_killed_run_goes_on_to_the_same_losses_and_adapter(
    project: Path, undisturbed: RunFiles, killed: tuple[RunFiles, RunFiles]
) -> None:
    files, _ = killed
    status = read_status(files)
    assert (status.state, status.saved_step) == ("lost", list_steps(files)[0])
    assert status.total_steps == STEPS
    assert 8 <= status.step < STEPS
    process = command(project, "resume", str(files.root), "--json")
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "waiting for the ranks of an earlier start to end" in first
    for rank in ranks_of(files):
        rank.kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert (found["ok"], found["run_dir"], found["state"]) == (True, str(files.root), "finished")
    assert found["measures"]["eval_loss"] == losses(undisturbed)["eval", STEPS]
    assert read_status(files).eval_loss == losses(undisturbed)["eval", STEPS]
    assert losses(files) == losses(undisturbed)
    assert same_adapters(files, undisturbed)

    [resume] = [row for row in read_json_lines(files.events) if row["event"] == "resume"]
    assert f"going on from step {resume['step']} (" in errors
    assert json.loads(files.report_json.read_text())["resumes"][0]["step"] == resume["step"]
    [entry] = json.loads(files.lock.read_text())["resumes"]
    assert (entry["step"], entry["world_size"], entry["forced"]) == (resume["step"], 2, [])
    assert "before: What is one?" not in errors, "what was there before is not asked again"
    assert errors.count("What is one?") >= 2, "the summary shows it all the same"


def test_another_world_and_layout_go_on_past_a_damaged_checkpoint(
    fsdpq: Run, undisturbed: RunFiles, killed: tuple[RunFiles, RunFiles], tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "run")
    shutil.copytree(killed[1].root, files.root)
    newest, before, *_ = list_checkpoints(files.checkpoints)
    victim = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = fsdpq(
        "resume", str(files.root), "launch.nproc_per_node=1", "fsdp.offload=cpu",
        "fsdp.activation_checkpointing=none", "training.micro_batch_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = f"{newest} is damaged: {victim.name} is not what was written"
    assert f"{named}; the run goes on from {before.name}" in done.stderr
    assert f"({before.name}, saved by 2 ranks)" in done.stderr
    assert losses(files) == pytest.approx(losses(undisturbed), rel=1e-5)
    name = "adapter_model.safetensors"
    mine, theirs = load_file(files.adapter / name), load_file(undisturbed.adapter / name)
    assert all(weight.allclose(theirs[key], atol=1e-4) for key, weight in mine.items())
    assert "offload: cpu" in files.resolved.read_text()


def test_another_run_is_refused_and_can_be_forced(
    fsdpq: Run, project: Path, killed: tuple[RunFiles, RunFiles], tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "run")
    shutil.copytree(killed[1].root, files.root)
    lines = (project / "rows.jsonl").read_text().splitlines()
    (project / "fewer.jsonl").write_text("\n".join(lines[:24]) + "\n")
    changes = ("data.path=fewer.jsonl", "optimizer.lr=0.02", f"training.steps={STEPS - 8}")
    resolved = files.resolved.read_text()
    refused = fsdpq("resume", str(files.root), *changes)
    assert refused.returncode == 2
    assert f"`{files.root}` would go on as another run: `optimizer.lr` is another" in refused.stderr
    assert (
        "\noptimizer.lr\n  -  0.001\n  +  0.02   command line: optimizer.lr=0.02\n"
        in refused.stderr
    )
    assert "--force" in refused.stderr
    data = fsdpq("resume", str(files.root), changes[0])
    assert data.returncode == 2
    assert "the rows are others (fewer.jsonl is new; rows.jsonl is not used" in data.stderr
    assert files.resolved.read_text() == resolved, "a refusal changes nothing"
    forced = fsdpq("resume", str(files.root), "--force", *changes, "launch.nproc_per_node=1")
    assert forced.returncode == 0, forced.stderr
    assert "note: going on as another run: `optimizer.lr` was 0.001 and is 0.02" in forced.stderr
    assert "training goes on at the first row" in forced.stderr
    [entry] = json.loads(files.lock.read_text())["resumes"]
    assert {change["what"] for change in entry["forced"]} == {
        "optimizer.lr", "training.steps", "data.path", "the rows",
    }  # fmt: skip
    assert max(step for _, step in losses(files)) == STEPS - 8
    again = fsdpq("resume", str(files.root))
    assert again.returncode == 0, "what was forced is not asked again"
    assert "has finished: there is nothing left to do" in again.stderr


def test_a_run_restarts_by_itself_and_is_found_again(
    fsdpq: Run, project: Path, undisturbed: RunFiles, tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "run")
    settings = (*SETTINGS, "checkpoint.resume=auto", "launch.max_restarts=3")
    arguments = ("train", "recipe.yaml", "--run-dir", str(files.root), *settings)
    process = command(project, *arguments)
    wait_for(has_saved(files, 4), process)
    in_use = fsdpq("resume", str(files.root))
    assert in_use.returncode == 2
    assert f"is in use: process {process.pid} on " in in_use.stderr
    ranks_of(files)[1].kill()
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    assert "rank 1 was killed (SIGKILL): restart 1 of 3, going on from step " in errors
    assert losses(files) == losses(undisturbed)
    assert same_adapters(files, undisturbed)
    assert (files.attempt(1) / "torchrun.log").exists()
    assert not list(files.logs.glob("rank-*.error.json"))

    again = fsdpq(*arguments, "metrics.log_interval=2")
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == str(files.root)
    assert "has finished: there is nothing left to do" in again.stderr
    other = fsdpq(*arguments, "training.seed=4")
    assert other.returncode == 2
    assert "training.seed\n  -  3\n  +  4  command line: training.seed=4" in other.stderr
