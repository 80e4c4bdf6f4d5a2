"""One cluster and one project for all tests of this folder; skipped where Slurm cannot run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Run
from support.project import save_project
from support.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A running Slurm of one node with two cores."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = SlurmCluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def project(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe.yaml``, ``model/`` and ``rows.jsonl``."""
    folder = save_project(tmp_path_factory.mktemp("slurm") / "a project")
    cluster.environment["FSDPQ_CACHE"] = str(folder.parent / "cache")
    return folder


@pytest.fixture(scope="session")
def fsdpq(cluster: SlurmCluster, project: Path) -> Run:
    """Runs the command line in the project's folder, beside the cluster."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fsdpq", *arguments],
            cwd=project, env=cluster.environment, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip

    return run
