"""The worker's ``quantize --format bnb``, as the launcher starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from support.bnb_repository import save_quantized, stored_tensors
from support.tiny import tiny_recipe

from fsdpq.recipe.load import dump_recipe


def test_worker_writes_what_transformers_writes(tmp_path: Path) -> None:
    expected = stored_tensors(save_quantized(tmp_path, bnb_4bit_use_double_quant=True))
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "logs").mkdir(parents=True)
    recipe = tiny_recipe(launch={"device": "cpu", "nproc_per_node": 1})
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    model = {"directory": str(tmp_path / "plain"), "revision": None}
    (run / "run.lock.json").write_text(json.dumps({"inputs": {"model": model}}))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    worker = ("-m", "fsdpq.worker", "quantize", str(run), "--out", str(out), "--format", "bnb")
    done = subprocess.run(
        [sys.executable, *torchrun, *worker],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = stored_tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    loads = [row for row in rows if row["event"] == "load"]
    assert loads[-1]["done_bytes"] == loads[-1]["total_bytes"] > 0
