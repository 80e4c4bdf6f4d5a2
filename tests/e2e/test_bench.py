"""``fsdpq bench step --compare transformers`` trains the same model on the same batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_contenders_train_the_same_model_on_the_same_batch(tmp_path: Path) -> None:
    settings = {"shape": "tiny", "batches": "2x32", "rounds": 0, "dtypes": "fp32"}
    changes = [f"--set=step.{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-m", "fsdpq", "bench", "step", "--compare", "transformers",
         "--device", "cpu", "--out", str(tmp_path), *changes],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]["step"]
    rows = {row["contender"]: row for row in content["tables"][0]["rows"]}
    assert rows.keys() == {"fsdpq", "transformers"}
    ours, theirs = rows["fsdpq"]["first_loss"], rows["transformers"]["first_loss"]
    assert ours == pytest.approx(theirs, rel=1e-5), "fp32 sums in another order"
    for row in rows.values():
        assert row["last_loss"] < row["first_loss"]
        assert 0 < row["mfu"] < row["share"] < 1
        assert row["peak_mb"] > 100
    assert (tmp_path / "step-speed.png").stat().st_size > 5000
    assert "| 2x32          | fp32  | transformers |" in done.stdout
