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


def test_length_that_fits_is_where_a_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts.gpu.parts.alone import where_it_ends

    points = [(100, 9.0), (1000, 2.0), (2000, 4.0)]
    assert where_it_ends(points, 10.0, step=256) == 4864  # 5000, rounded down
    assert where_it_ends(points, 3.0, step=256) == 2000, "never shorter than what fitted"
    assert where_it_ends([(1000, 2.0), (2000, 2.0)], 10.0, step=256) == 2000


PROOF = """
import gc, sys, torch, warnings
from pathlib import Path
from scripts.gpu import cases
from scripts.gpu.parts import Bench, alone, proof
from scripts.gpu.rows import Rows
warnings.simplefilter("ignore")
gc.freeze()  # collecting what was imported takes half of the time
alone.FIRST_LENGTHS = {False: (512, 1024), True: (512, 1024)}
alone.MAX_TOKENS = 1280
bench = Bench(Rows(Path(sys.argv[1]), "proof"), torch.device("cpu"), tiny=True)
some = (cases.FEW_CARDS[0], cases.CASES[-1])
proof.foretell(bench, (*some, cases.ALONE_DISK))
for part in (alone.pinned, alone.disk):
    part(bench)
    torch.distributed.destroy_process_group()
proof._measure_all(bench, some)
"""


def test_proof_of_70b_runs_with_tiny_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", PROOF, str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts.gpu.side_by_side import alone_table, joined, table

    rows = joined([path])
    assert not [(name, row) for name, row in rows.items() if "error" in row]
    pinned, disk = rows["70b, 2x2048, offload=cpu"], rows["70b, 2x2048, offload=disk"]
    assert disk["losses"][0] == pinned["losses"][0], "the same random weights, from a file"
    assert disk["anon_peak_gib"] >= disk["anon_loaded_gib"] > 0
    assert rows["disk, base"]["file_gb"] > 0
    assert {"70b, 1x32", "70b, 1x64", "70b, 1x64, activation_offload=True"} <= rows.keys()
    assert "70b, 2x128, activation_offload=True, capped to 6 GiB" in rows
    few = "70b, rank 0 of 2, 2x2048, r16, activation_offload=True, layer_chunks=2"
    assert rows[few]["plan_gib"] > 0
    assert rows[few]["peak_gib"] > 0
    [line] = [line for line in table(rows) if few in line]
    ratio = rows[few]["peak_gib"] / rows[few]["plan_gib"]
    assert line.split(" | ")[4] == f"{ratio:.3f}"
    [line] = [line for line in alone_table(rows) if "offload=disk" in line]
    assert line.count("|  |") == 1, "but for the plan's speed, of a CPU"
    [theirs] = [line for line in table(rows) if "mistral-7b, rank 0 of 2, 1x24576" in line]
    assert theirs.endswith(" |  | 22.54 |"), "not measured"


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
