"""A rank that hangs, with the real worker on two ranks: seen, named, ended.

Other ways to hang: `tests/unit/launch/test_launch_watch.py`, with ranks that need no torch.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from support.screens import Lines

from fsdpq.errors import LaunchError
from fsdpq.launch.train import train
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

WORKER = Path(__file__).parents[1] / "support" / "misbehaving_worker.py"
LIMIT_S = 5.0


def test_a_rank_stuck_in_c_is_named(
    project: Path,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = RunFiles(tmp_path / "run")
    monkeypatch.setenv("FSDPQ_CACHE", environment["FSDPQ_CACHE"])
    monkeypatch.setenv("MISBEHAVE", "gil:0:3")
    overrides = [
        f"launch.hang_timeout_s={LIMIT_S}",
        "data.eval_fraction=0",
        "metrics.sample_prompts=[]",
        "metrics.sample_max_new_tokens=48",
    ]
    with pytest.raises(LaunchError) as caught:
        train(
            project / "recipe.yaml",
            overrides,
            run_dir=files.root, screen=Lines(), worker=(str(WORKER), "train"),
        )  # fmt: skip
    ended = time.time()
    message = caught.value.message
    assert message.startswith("the ranks hang: none has got further for 5 s")
    assert f"rank 0 is stuck in the forward pass of step 3: `hold_the_gil` ({WORKER}:" in message
    assert "rank 1: in the forward pass of step 3, waits in " in caught.value.details
    assert "misbehaving_worker.py" in files.rank_stack(0).read_text()
    steps = [row for row in read_json_lines(files.metrics) if row["event"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert ended - steps[-1]["time"] < LIMIT_S + 45, "within a minute"
    assert not [p for p in psutil.process_iter(["cmdline"]) if _is_of(p, files.root)]


def _is_of(process: psutil.Process, root: Path) -> bool:
    return str(root) in (process.info["cmdline"] or [])
