"""`fsdpq train RECIPE --smoke`: a sample of the library that changes every day, or all of it.

The recipe that trains from disk is always in it: only there a smoke run writes a base first.

``FSDPQ_SMOKE=all`` (``make test-recipes``) runs every recipe; the day of a failure is in its id.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "recipes").glob("*.yaml"))
SAMPLE_SIZE = 1
ALWAYS = ROOT / "recipes/llama-3-70b-qlora-disk-1x24gb.yaml"


def chosen() -> list[Path]:
    """Returns today's recipes: neighbours by name are far apart in the sample."""
    if os.environ.get("FSDPQ_SMOKE") == "all":
        return PATHS
    today = datetime.datetime.now(datetime.timezone.utc).date().toordinal()
    stride = len(PATHS) // SAMPLE_SIZE
    sample = {PATHS[(today + index * stride) % len(PATHS)] for index in range(SAMPLE_SIZE)}
    return sorted(sample | {ALWAYS})


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of its own, and no way to a network."""
    cache = tmp_path_factory.mktemp("cache")
    nowhere = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), nowhere)
    return os.environ | proxies | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"}


@pytest.mark.parametrize("path", chosen(), ids=lambda path: path.stem)
def test_recipe_runs_without_gpu_and_download(
    path: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "run")
    command = ["train", str(path), "--smoke", "--run-dir", str(files.root)]
    done = subprocess.run(
        [sys.executable, "-m", "fsdpq", *command],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [row for row in read_json_lines(files.metrics) if row["event"] == "step"]
    assert len(steps) == 3
    assert all(row["loss"] > 0 for row in steps)
    lock = json.loads(files.lock.read_text(encoding="utf-8"))
    assert lock["world_size"] == 2
    assert lock["inputs"]["model"]["source"].startswith("made up")
    assert files.report_html.exists()
