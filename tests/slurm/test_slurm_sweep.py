"""A sweep as an array of a real Slurm: submitted, at work, collected."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.commands import Run
from support.slurm_cluster import SlurmCluster

from fsdpq.errors import ExitCode

SWEEP = (
    "recipe.yaml", "adapter.rank=choice(4)", "--scheduler", "slurm", "--parallel", "auto",
    "--out", "swept", "training.steps=1", "export.verify=false", "launch.nproc_per_node=1",
)  # fmt: skip


@pytest.mark.timeout(400)
def test_a_sweep_is_an_array_whose_results_are_collected_later(
    fsdpq: Run, project: Path, cluster: SlurmCluster
) -> None:
    submitted = fsdpq("sweep", *SWEEP)
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted array" in submitted.stderr
    assert submitted.stdout == "swept\n"
    early = fsdpq("sweep", "swept", "--quiet")
    assert early.returncode == ExitCode.SAVED, early.stderr
    assert json.loads((project / "swept/slurm/job.json").read_text())["earlier"] == []

    outcomes = project / "swept" / "outcomes"

    def statuses() -> list[str]:
        return [json.loads(path.read_text())["status"] for path in outcomes.glob("*.json")]

    cluster.wait_for(lambda: statuses() == ["finished"])
    while (collected := fsdpq("sweep", "swept", "--json")).returncode == ExitCode.SAVED:
        time.sleep(0.5)  # the last task has written its outcome, and ends
    assert collected.returncode == 0, collected.stderr
    content = json.loads(collected.stdout)
    assert [trial["rank"] for trial in content["trials"]] == [1]
