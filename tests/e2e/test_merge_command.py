"""`export.merge` and `fsdpq merge`: from a command line to what stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.bnb_repository import stored_tensors
from support.commands import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines


def test_a_run_leaves_a_merged_model_and_merges_again_in_another_way(
    fsdpq: Run, tmp_path: Path
) -> None:
    files, out = RunFiles(tmp_path / "run"), tmp_path / "out"
    done = fsdpq(
        "train", "recipe.yaml", "training.steps=6",
        "export.merge=true", "data.chat_template=terse.jinja", "--run-dir", str(files.root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the merged model is in `{files.merged}`" in done.stderr
    receipt = json.loads((files.merged / "merge.json").read_text())
    # The comparison computes the losses that training told, from the files alone.
    told = [row["loss"] for row in read_json_lines(files.metrics) if row["event"] == "eval"]
    models = receipt["likeness"]["models"]
    assert receipt["likeness"]["text"] == "held-out rows of the run"
    assert models["base"]["loss"] == pytest.approx(told[0], abs=2e-4)
    assert models["trained"]["loss"] == pytest.approx(told[1], abs=2e-4)
    assert models["merged"]["mean_kl"] < 1e-6
    assert "The merged model is the trained model" in done.stderr
    adapted, merged = (AutoTokenizer.from_pretrained(p) for p in (files.adapter, files.merged))
    assert merged.chat_template == adapted.chat_template, "that of the run, not of the base"

    again = fsdpq(
        "merge", str(files.root), "--out", str(out), "--onto", "original", "--requantize", "nf4",
        "--dtype", "bf16", "--compare-tokens", "64", "--json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((out / "merge.json").read_text())
    assert "merged onto the original weights in bf16, quantized again as nf4" in again.stderr
    assert "  quantized again" in again.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.load_in_4bit
    assert stored_tensors(out)["model.norm.weight"].dtype == torch.bfloat16

    taken = fsdpq("merge", str(files.root), "--out", str(out))
    assert taken.returncode == 2
    assert "exists and is not empty" in taken.stderr
