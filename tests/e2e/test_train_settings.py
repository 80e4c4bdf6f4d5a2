"""`fsdpq train` with sharding, precision and metrics settings, through the real worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run
from support.wandb_files import read_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from fsdpq.recipe.load import load_resolved
from fsdpq.reports.run_record import read_record
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

SETTINGS = (
    "fsdp.strategy=shard_grad_op",
    "fsdp.offload=cpu",
    "fsdp.offload_trained=false",
    "fsdp.precision.compute=fp16",  # with fp32 buffers `fp16_autocast`
    "fsdp.precision.buffers=fp32",
    "fsdp.precision.reduce=bf16",
    "data.chat_template=terse.jinja",
    "data.train_on_eos=last",
    "model.dtype=auto",
    "fsdp.activation_checkpointing=selective",
    "fsdp.activation_offload=true",
    "fsdp.no_sync=true",
    "training.layer_chunks=2",
    "training.micro_batch_size=2",
    "training.steps=8",
    "data.streaming=true",
    "data.stream_window=100",
    "data.packing=best_fit",
    "data.eval_fraction=0",
    "data.eval.path=rows.jsonl",
    "metrics.sinks=[jsonl,tensorboard,wandb]",
    "metrics.wandb.project=tiny",
    "metrics.wandb.mode=offline",
    "metrics.wandb.log_adapter=true",
    "metrics.log_memory=true",
    "metrics.profile.start_step=2",
    "metrics.profile.num_steps=1",
)


def _check_trackers(files: RunFiles, steps: list[dict[str, Any]]) -> None:
    """Every number of every step is what ``metrics.jsonl`` has; TensorBoard keeps it in fp32."""
    events = EventAccumulator(str(files.tensorboard))
    events.Reload()
    sent = read_run(files.root / "wandb")
    names = {f"train/{key}" for key, value in steps[0].items() if isinstance(value, float | int)}
    names -= {"train/step", "train/total_steps", "train/time"}
    assert {name for name in events.Tags()["scalars"] if name.startswith("train/")} == names
    for name in names:
        wanted = [(row["step"], row[name.removeprefix("train/")]) for row in steps]
        assert sent.values(name) == wanted
        written = events.Scalars(name)
        assert [event.step for event in written] == [step for step, _ in wanted]
        values = [event.value for event in written]
        assert values == pytest.approx([value for _, value in wanted], rel=1e-6)
    assert sent.config == load_resolved(files.resolved).model_dump(mode="json")
    assert (sent.exit_code, sent.run.display_name) == (0, files.root.name)
    assert len(sent.values("memory/backward/peak_bytes")) == 8
    [table] = (files.root / "wandb").rglob("*.table.json")
    answers = read_record(files).samples
    assert json.loads(table.read_text())["data"] == [list(answer.values()) for answer in answers]
    [artifact] = [each for each in sent.artifacts if each.type == "model"]
    found = {entry.path: entry.size for entry in artifact.manifest.contents}
    lies = [path for path in files.adapter.rglob("*") if path.is_file()]
    assert found == {str(path.relative_to(files.adapter)): path.stat().st_size for path in lies}


def test_settings_together_train_and_leave_their_files(
    fsdpq: Run, project: Path, tmp_path: Path
) -> None:
    files = RunFiles(tmp_path / "run")
    done = fsdpq("train", "recipe.yaml", "--run-dir", str(files.root), *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "fp32 under autocast to fp16" in done.stderr
    rows = list(read_json_lines(files.metrics))
    steps = [row for row in rows if row["event"] == "step"]
    losses = [row["loss"] for row in steps]
    assert losses[-1] < 0.9 * losses[0]
    assert steps[-1]["loss_scale"] == 2.0**16
    assert steps[-1]["skipped_steps"] == 0
    assert all(row["data_wait_s"] >= 0 for row in steps)
    windows = [row for row in read_json_lines(files.events) if row["event"] == "stream"]
    assert [(row["epoch"], row["window"], row["rows"]) for row in windows[:2]] == [
        (1, 0, 32), (2, 0, 32),
    ]  # fmt: skip
    assert len([row for row in rows if row["event"] == "eval"]) == 2
    memory = [row["phase"] for row in rows if row["event"] == "memory"]
    assert memory == ["start", "shard", "load", "init", *(["forward", "backward", "optimizer"] * 8)]
    report = json.loads(files.report_json.read_text())["memory_phases"]
    assert [row["phase"] for row in report] == memory[:7]

    _check_trackers(files, steps)
    for rank in (0, 1):
        names = {e["name"] for e in json.loads(files.profile(rank).read_text())["traceEvents"]}
        assert "step 2" in names
        assert "step 3" not in names

    (project / "terse.jinja").unlink()  # the run has its own copy
    answer = fsdpq("generate", str(files.root), "--prompt", "What is one?")
    assert answer.returncode == 0, answer.stderr
    saved = AutoTokenizer.from_pretrained(files.adapter)
    asked = saved.apply_chat_template(
        [{"role": "user", "content": "What is one?"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "u: What is one?<|endoftext|>a: "
    assert saved.eos_token == "<|endoftext|>", "generation stops where answers end"
