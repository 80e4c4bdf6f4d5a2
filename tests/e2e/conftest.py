"""A folder as a user has it: a small model with a tokenizer, rows, a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run
from support.project import save_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe.yaml``, ``model/`` and ``rows.jsonl``."""
    return save_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the commands: no colours, and a cache where data is prepared once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"}


@pytest.fixture
def fsdpq(project: Path, environment: dict[str, str]) -> Run:
    """Runs the command line in the project's folder."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fsdpq", *arguments],
            cwd=project, env=environment, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip

    return run
