"""`fsdpq train` with the real worker on two ranks: what it leaves, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import Run
from transformers import AutoModelForCausalLM

from fsdpq.launch.runs.status import read_status
from fsdpq.plan.host import CPU_RANK_BYTES
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.tensor_files.checkpoint_manifest import check_checkpoint, list_checkpoints


def _losses(files: RunFiles) -> list[float]:
    return [row["loss"] for row in read_json_lines(files.metrics) if row["event"] == "step"]


def _workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "fsdpq.worker" in (process.info["cmdline"] or []):
            found.append(process)
    return found


def _check_a_changed_row_is_named(fsdpq: Run, files: RunFiles, moved: Path) -> None:
    unchanged = fsdpq("reproduce", str(files.root), "--check", "--base-dir", str(moved))
    assert (unchanged.returncode, "things are as they were" in unchanged.stdout) == (0, True)
    (moved / "rows.jsonl").write_text((moved / "rows.jsonl").read_text().replace("two", "too"))
    changed = fsdpq("reproduce", str(files.root), "--check", "--base-dir", str(moved))
    assert changed.returncode == 1
    assert f"{moved / 'rows.jsonl'}" in changed.stdout


def _check_export(files: RunFiles, project: Path) -> None:
    """The export was checked, and its card says nothing private and how to load it."""
    exported = next(row for row in read_json_lines(files.events) if row["event"] == "export")
    assert (exported["format"], exported["verified"]) == ("peft", True)
    assert exported["max_difference"] < 1e-5
    assert exported["num_bytes"] == sum(path.stat().st_size for path in files.adapter.iterdir())
    assert not files.adapter.with_suffix(".unverified").exists()
    card = (files.adapter / "README.md").read_text()
    for private in (str(project), str(files.root), str(Path.home()), "What is one?"):
        assert private not in card
    lock = json.loads(files.lock.read_text())
    assert lock["inputs"]["model"]["sha256"] in card
    assert lock["inputs"]["data"]["train"][0]["files"][0]["sha256"] in card
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("BASE", str(project / "model")).replace("THIS", str(files.adapter)), names)
    assert isinstance(names["model"], PeftModel)
    svg = ElementTree.parse(files.adapter / "loss.svg").getroot()
    assert len(svg.findall(".//{*}circle[@class='training']")) == 24


def _check_plan(files: RunFiles) -> None:
    """The run was what it was planned to be: bytes to the byte, processes to a tenth."""
    compared = json.loads(files.report_json.read_text())["plan_against_actual"]
    assert compared["drift"] is None
    assert [row["name"] for row in compared["phases"]] == [
        "load", "init", "forward", "backward", "optimizer",
    ]  # fmt: skip
    assert [row["name"] for row in compared["categories"]] == [
        "codes", "scales", "plain", "trained", "gradients", "optimizer",
    ]  # fmt: skip
    for row in compared["categories"]:
        assert row["measured_bytes"] == row["predicted_bytes"], row
    start = next(row for row in read_json_lines(files.metrics) if row["event"] == "memory")
    assert start["anonymous_bytes"] == pytest.approx(CPU_RANK_BYTES, rel=0.1)


def _check_what_others_see(fsdpq: Run, files: RunFiles, told: str) -> None:
    """Who follows a run sees what its own screen showed, from the set-up on."""
    tail = fsdpq("tail", str(files.root), "-n", "all")
    assert (tail.returncode, tail.stderr) == (0, "")
    begin = told.index("opening the data")
    assert tail.stdout == f"run directory {files.root}\n{told[begin:]}"
    (run,) = json.loads(fsdpq("runs", "ls", str(files.root), "--json").stdout)
    assert (run["state"], run["step"], run["total_steps"]) == ("finished", 24, 24)
    assert run["num_bytes"] == sum(p.stat().st_size for p in files.root.rglob("*") if p.is_file())


def test_a_run_leaves_all_that_it_promises(fsdpq: Run, project: Path, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "first")
    done = fsdpq("train", "recipe.yaml", "--run-dir", str(files.root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("first")

    _check_plan(files)
    losses = _losses(files)
    assert len(losses) == 24
    held_out = [row for row in read_json_lines(files.metrics) if row["event"] == "eval"]
    assert [row["step"] for row in held_out] == [0, 24]
    # The answers repeat the question's word: there is much to learn in few steps.
    assert held_out[1]["loss"] < 0.85 * held_out[0]["loss"]
    assert f"{held_out[1]['loss']:.4f}" in done.stderr
    step = next(row for row in read_json_lines(files.metrics) if row["event"] == "step")
    keys = {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_bytes"}
    assert keys <= step.keys()

    lock = json.loads(files.lock.read_text())
    assert lock["world_size"] == 2
    assert files.recipe.read_text() == (project / "recipe.yaml").read_text()
    assert "What is one?" in files.report_html.read_text()
    assert files.rank_log(0).exists()
    assert files.rank_log(1).exists()

    weights = load_file(files.adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 3
    base = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, files.adapter)
    loaded = dict(stock.named_parameters())
    for name, weight in weights.items():
        key = name.replace(".weight", ".default.weight")
        assert torch.equal(loaded[key], weight)

    _check_export(files, project)
    _check_what_others_see(fsdpq, files, done.stderr)

    again = RunFiles(tmp_path / "second")
    reproduced = fsdpq("reproduce", str(files.lock), "--run-dir", str(again.root))
    assert reproduced.returncode == 0, reproduced.stderr
    assert "all 26 losses that both runs logged are identical" in reproduced.stderr
    assert _losses(again) == losses, "same recipe, same seed, same losses"
    for name, weight in load_file(again.adapter / "adapter_model.safetensors").items():
        assert torch.equal(weight, weights[name])


def test_a_loss_that_is_not_finite_stops_the_run(fsdpq: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = fsdpq(
        "train", "recipe.yaml", "optimizer.lr=1e20", "training.max_grad_norm=null",
        "data.eval_fraction=0", "--run-dir", str(run_dir),
    )  # fmt: skip
    assert done.returncode == 1
    assert "is not finite on rank" in done.stderr
    assert "the loss of step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not RunFiles(run_dir).adapter.exists(), "nothing half-trained is exported"


def test_data_without_answers_is_explained(fsdpq: Run, project: Path, tmp_path: Path) -> None:
    rows = project / "questions.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    done = fsdpq(
        "train", "recipe.yaml", "data.path=questions.jsonl", "--run-dir", str(tmp_path / "run")
    )
    assert done.returncode == 2
    assert "none of the 1 rows has a token that carries loss" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_does_not_fit_trains_nothing(
    fsdpq: Run, project: Path, tmp_path: Path
) -> None:
    broken = project / "broken"
    broken.mkdir(exist_ok=True)
    for path in (project / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 384}))
    done = fsdpq(
        "train", "recipe.yaml", "model.name_or_path=broken", "--run-dir", str(tmp_path / "run")
    )
    assert done.returncode == 1
    assert "`model.layers.0.mlp.down_proj.weight` has shape [192, 320]" in done.stderr
    assert "the model needs [192, 384]" in done.stderr
    assert not _losses(RunFiles(tmp_path / "run"))


@pytest.mark.parametrize(
    ("victim", "exit_code", "message"),
    [("all", 75, "stopped by SIGUSR1 after step"), ("rank", 1, "was killed (SIGKILL)")],
)
def test_a_stopped_run_leaves_no_process(
    project: Path,
    environment: dict[str, str],
    tmp_path: Path,
    victim: str,
    exit_code: int,
    message: str,
) -> None:
    files = RunFiles(tmp_path / "run")
    arguments = ["train", "recipe.yaml", "training.steps=100000", "--run-dir", str(files.root)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fsdpq", *arguments],
        cwd=project, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not _losses(files):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    if victim == "all":  # as Slurm does it
        for each in (process, *psutil.Process(process.pid).children(recursive=True)):
            each.send_signal(signal.SIGUSR1)
    else:
        own = [p for p in _workers() if str(files.root) in p.cmdline()]
        ranks = [p for p in own if p.environ().get("RANK") == "1"]
        os.kill(ranks[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    assert message in errors
    status = read_status(files)
    assert (status.state, status.exit_code) == ("saved" if victim == "all" else "failed", exit_code)
    assert f"{status.step} of 100000 steps: " in errors, "what was done is summed up"
    assert not [p for p in _workers() if str(files.root) in p.cmdline()]
    assert not files.adapter.exists()
    if victim == "all":
        last_step = list(read_json_lines(files.metrics))[-1]["step"]
        (directory,) = list_checkpoints(files.checkpoints)
        assert check_checkpoint(directory).step == last_step
        assert f"{message} {last_step} of 100000; saved: go on from step {last_step}" in errors
