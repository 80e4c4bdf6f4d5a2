"""``fsdpq sweep`` over a tiny model: one base, one table, the same one after everything was killed.

``python -m chaos.sweeps`` is the long campaign, see ``docs/developing/chaos.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
from chaos.sweeps import find_differences
from support.commands import Run

from fsdpq.errors import ExitCode
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import read_outcome
from fsdpq.tensor_files.checkpoint_manifest import list_checkpoints

# `offload: disk` needs a quantized base as a file, however small the model is.
SWEEP = (
    "recipe.yaml", "adapter.rank=4,8", "optimizer.lr=1e-3", "training.steps=4",
    "training.eval_interval=2", "checkpoint.interval=1", "export.verify=false",
    "fsdp.offload=disk", "launch.nproc_per_node=1", "metrics.sample_max_new_tokens=1",
)  # fmt: skip

pytestmark = [pytest.mark.usefixtures("project"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache: what is in it afterwards the sweep made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1", "GITHUB_ACTIONS": ""}


@pytest.fixture(scope="module")
def undisturbed(
    project: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepFiles, subprocess.CompletedProcess[str]]:
    """A sweep of two trials at once."""
    files = SweepFiles(tmp_path_factory.mktemp("sweeps") / "peaceful")
    done = subprocess.run(
        [sys.executable, "-m", "fsdpq", "sweep", *SWEEP, "--parallel", "2", "--out", files.root],
        cwd=project, env=os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return files, done


def test_trials_share_one_base_and_one_preparation(
    undisturbed: tuple[SweepFiles, subprocess.CompletedProcess[str]], cache: Path
) -> None:
    files, done = undisturbed
    assert done.stdout == f"{files.root}\n"
    assert "2 trials: 2 finished" in done.stderr
    content = json.loads(files.results_json.read_text())
    assert [trial["rank"] for trial in content["trials"]] == [1, 2]
    logs = [log.read_text() for log in files.root.glob("logs/*")]
    assert len(logs) == 2
    assert sum("quantizing the base" in log for log in logs) == 1, logs
    # Whoever made the rows wrote down how long that took, and the other one shows the same.
    told = {line for log in logs for line in log.splitlines() if line.startswith("prepared 24")}
    assert len(told) == 1, logs
    for kind in ("bases", "prepared"):
        assert len([path for path in (cache / kind).iterdir() if path.is_dir()]) == 1


def test_a_trial_whose_processes_are_all_killed_gives_the_same_row(
    undisturbed: tuple[SweepFiles, subprocess.CompletedProcess[str]],
    fsdpq: Run, project: Path, environment: dict[str, str],
) -> None:  # fmt: skip
    peaceful, _ = undisturbed
    killed = SweepFiles(peaceful.root.with_name("killed"))
    # One trial of the two: how a sweep goes on with the others is no matter of real training.
    first = json.loads(peaceful.trials.read_text())["trials"][0]["id"]
    command = [sys.executable, "-m", "fsdpq", "sweep", *SWEEP, "--out", str(killed.root)]
    command += ["--only", first]
    runner = subprocess.Popen(
        command, cwd=project, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not list_checkpoints(killed.run(first).checkpoints):
        assert runner.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    everything = [psutil.Process(runner.pid)]
    everything += everything[0].children(recursive=True)
    for process in everything:
        process.kill()
    runner.communicate()
    assert read_outcome(killed, first).status == "running"

    again = fsdpq(*command[3:], timeout=400)
    assert again.returncode == 0, again.stderr
    assert read_outcome(killed, first).attempts == 2
    assert list(find_differences(peaceful, killed, only=first)) == []


def test_a_sweep_that_regresses_fails_in_ci(
    undisturbed: tuple[SweepFiles, subprocess.CompletedProcess[str]], fsdpq: Run, tmp_path: Path
) -> None:
    files, _ = undisturbed
    baseline = tmp_path / "baseline.json"
    content = json.loads(files.results_json.read_text())
    baseline.write_text(json.dumps(content))
    asked = ("sweep", str(files.root), "--ci", "--baseline", str(baseline))
    assert fsdpq(*asked, "--tolerance", "0").returncode == ExitCode.OK

    content["trials"][1]["measures"]["eval_loss"] *= 0.98  # it was 2 % better then
    baseline.write_text(json.dumps(content))
    worse = fsdpq(*asked, "--fail-if", "eval_loss>0.1")
    assert worse.returncode == ExitCode.RUN_FAILED
    assert "+2.04 %" in worse.stderr
    assert "starts" not in worse.stderr  # nothing was trained for this
    suites = ElementTree.fromstring(files.junit.read_bytes())
    assert (suites.get("tests"), suites.get("failures")) == ("4", "2")
    assert files.summary.read_text().startswith("## Sweep recipe: failed\n")
    assert fsdpq(*asked, "--tolerance", "0.03").returncode == ExitCode.OK
