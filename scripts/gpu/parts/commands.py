"""The commands that a user runs, on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.gpu.parts import Bench

ROOT = Path(__file__).parents[3]
LORA = "kind: lora, rank: 8, alpha: 16"
RUNS: dict[str, tuple[str, ...]] = {
    "fp32 on the CPU": ("launch.device=cpu",),
    "fp32": (),
    "fp32, offload cpu": ("fsdp.offload=cpu",),
    "fp32, offload disk": ("fsdp.offload=disk",),
    "fp32, all settings": (
        "fsdp.offload=cpu", "fsdp.offload_trained=false", "fsdp.activation_offload=true",
        "training.layer_chunks=2",
    ),
    "bf16": ("model.dtype=bf16",),
    "bf16, hqq, packed": ("model.dtype=bf16", "quantization.kind=hqq", "data.packing=best_fit"),
    "fp16 autocast": ("fsdp.precision.compute=fp16", "fsdp.precision.buffers=fp32"),
    "full finetuning": ("optimizer.lr=1e-3", "model.dtype=bf16"),
}  # fmt: skip


def self_test(bench: Bench) -> None:
    """Runs ``fsdpq doctor --self-test`` and counts its results."""
    bench.rows.attempt("doctor --self-test", _self_test, bench.device.type)


def _self_test(device_type: str) -> dict[str, Any]:
    command = ["doctor", "--self-test", "--json", "--device", device_type, "--nproc", "1"]
    done = _fsdpq(command, Path.cwd())
    found = json.loads(done.stdout)
    checks = found["checks"]
    counts = {
        status: sum(check["status"] == status for check in checks)
        for status in ("passed", "failed", "skipped")
    }
    notable = [
        f"{check['group']}, {check['name']}: {check['detail']}"
        for check in checks
        if check["status"] != "passed" or check["group"] in ("bytes", "offload", "training")
    ]
    slowest = max(checks, key=lambda check: check["seconds"])
    return {**counts, "slowest": [slowest["name"], slowest["seconds"]], "notable": notable}


def gpu_tests(bench: Bench) -> None:
    """Runs ``tests/gpu``."""
    bench.rows.attempt("tests/gpu", _gpu_tests)


def _gpu_tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    return {"exit": done.returncode, "summary": done.stdout.strip().splitlines()[-6:]}


def train(bench: Bench) -> None:
    """Runs ``fsdpq train`` and ``fsdpq generate`` on a tiny model, with several settings."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.project import RECIPE, save_project

    one_rank = RECIPE.replace("nproc_per_node: 2, device: cpu", "nproc_per_node: 1")
    with tempfile.TemporaryDirectory(prefix="fsdpq-gpu-") as directory:
        project = save_project(Path(directory))
        (project / "recipe.yaml").write_text(one_rank, encoding="utf-8")
        full = one_rank.replace("kind: bnb", "kind: none").replace(LORA, "kind: none")
        (project / "full finetuning.yaml").write_text(full, encoding="utf-8")
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2)) as pool:
            device = f"launch.device={bench.device.type}"
            tasks = [
                pool.submit(
                    bench.rows.attempt, f"train, {name}", _train, project, name, (device, *s)
                )
                for name, s in RUNS.items()
            ]
            for task in tasks:
                task.result()


def _train(project: Path, name: str, settings: tuple[str, ...]) -> dict[str, Any]:
    run = project / f"run {name}".replace(" ", "-").replace(",", "")
    started = time.perf_counter()
    recipe = f"{name}.yaml" if (project / f"{name}.yaml").exists() else "recipe.yaml"
    done = _fsdpq(["train", recipe, "--run-dir", str(run), *settings], project)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(" / ".join(done.stderr.strip().splitlines()[-4:]))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if row["event"] == "step"]
    asked = _fsdpq(["generate", str(run), "--prompt", "What is one?"], project)
    if asked.returncode:
        raise RuntimeError("generate: " + " / ".join(asked.stderr.strip().splitlines()[-4:]))
    return {
        "first_loss": losses[0], "last_loss": losses[-1], "seconds": round(seconds, 1),
        "answer": asked.stdout.strip()[:40],
    }  # fmt: skip


def _fsdpq(arguments: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NO_COLOR": "1", "FSDPQ_CACHE": str(where / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "fsdpq", *arguments], cwd=where, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stderr[-3000:])
    return done
