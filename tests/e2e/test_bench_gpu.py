"""``make bench-gpu`` notices a base that differs from the library's, and documents that leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import ROOT


def test_time_of_copies_beside_kernels_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts.gpu.parts.trace import summary

    events = [
        ("gemm", (0.0, 4e6)), ("gemm", (3e6, 5e6)), ("add", (9e6, 10e6)),
        ("Memcpy HtoD (Pinned -> Device)", (4e6, 7e6)), ("Memcpy DtoD", (20e6, 30e6)),
    ]  # fmt: skip
    wanted = {"num_kernels": 3, "kernels_s": 6.0, "from_host_s": 3.0, "both_s": 1.0}
    assert summary(events) == wanted


def test_checks_compare_bytes_and_move_documents(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu", "--plan", "smoke", "--device", "cpu",
         "--parts", "bases", "isolation", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, log
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = {(row["part"], row["name"]): row for row in map(json.loads, lines)}
    assert not [row for row in rows.values() if "error" in row], log
    for offload in ("none", "cpu"):
        assert rows["bases*", f"offload {offload}"]["bytes"] > 100_000
        assert rows["bases*", f"offload {offload}"]["different"] == 0
    for attention in ("sdpa", "eager"):
        row = rows["isolation*", f"{attention}, float32"]
        assert row["logits_moved"] == row["gradients_moved"] == 0
        assert row["gradients_from_alone"] < 1e-5, "fp32 sums in another order"
        assert row["logits_moved_without_restart"] > 0.1
    assert "isolation" in done.stdout
