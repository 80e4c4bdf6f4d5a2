"""``make bench-train`` compares like with like, and counts what a step computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.imports import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM


def test_counted_operations_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts.bench_train.shapes import SHAPES, Batch, attention_flops, step_flops

    shape, batch = SHAPES["tiny"], Batch(2, 16)
    model = LlamaForCausalLM(LlamaConfig(**shape.config(batch.tokens)))
    model.enable_input_require_grads()
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0)
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    ids = torch.ones(batch.rows, batch.tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=ids, labels=ids).loss.backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = attention_flops(shape, batch, recompute=False)
    assert counted == step_flops(shape, batch, lora_rank=3, recompute=False) - attention


def test_contenders_train_the_same_model_on_the_same_batch(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_train", "--shape", "tiny", "--weights", "device",
         "--batches", "2x32", "--rounds", "1", "--threads", "1", "--dtypes", "fp32",
         "--offload", "cpu", "--activation-offload", "--json", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"fsdpq", "transformers"}
    ours, theirs = rows["fsdpq"]["first_loss"], rows["transformers"]["first_loss"]
    assert ours == pytest.approx(theirs, rel=1e-5), "fp32 sums in another order"
    for row in rows.values():
        assert row["last_loss"] < row["first_loss"]
        assert 0 < row["mfu"] < row["share"] < 1
        assert row["peak_bytes"] > 1e8
