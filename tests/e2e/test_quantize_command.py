"""The quantized base with the real worker: made once, loaded again, the same losses bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdpq.cli.screen import PlainScreen
from fsdpq.launch import base_cache
from fsdpq.launch.train import train
from fsdpq.run_files import RunFiles, read_json_lines
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME

SHORT = (
    "training.steps=2",
    "data.eval_fraction=0",
    "metrics.sample_prompts=[]",
    "~metrics.sample_max_new_tokens",
)


@pytest.fixture(autouse=True)
def everything_pays(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_cache, "MIN_BASE_BYTES", 0)


def losses(run_dir: Path, *overrides: str) -> list[float]:
    with (run_dir.parent / f"{run_dir.name}.txt").open("w") as stream:
        screen = PlainScreen(stream)
        files = train(Path("recipe.yaml"), [*SHORT, *overrides], run_dir=run_dir, screen=screen)
    return [row["loss"] for row in read_json_lines(files.metrics) if row["event"] == "step"]


@pytest.mark.timeout(900)  # four runs and a command, each of which starts ranks
def test_training_from_a_base_is_the_same_wherever_it_lies(fsdpq: Run, tmp_path: Path) -> None:
    streamed = losses(tmp_path / "streamed", "quantization.cache=false")
    assert not (tmp_path / "cache" / "bases").exists()
    assert losses(tmp_path / "first") == streamed
    (base,) = (path for path in (tmp_path / "cache" / "bases").glob("*") if path.is_dir())
    made = (base / WEIGHTS_NAME).stat().st_mtime_ns
    assert losses(tmp_path / "second") == streamed
    assert "quantizing" in (tmp_path / "first.txt").read_text()
    assert "quantizing" not in (tmp_path / "second.txt").read_text()
    assert (base / WEIGHTS_NAME).stat().st_mtime_ns == made
    assert str(base) in RunFiles(tmp_path / "second").lock.read_text()

    out = tmp_path / "out"
    done = fsdpq("quantize", "recipe.yaml", "--out", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert (out / WEIGHTS_NAME).read_bytes() == (base / WEIGHTS_NAME).read_bytes()
    assert losses(tmp_path / "third", f"model.name_or_path={out}") == streamed


def test_transformers_loads_what_is_written_for_it(fsdpq: Run, tmp_path: Path) -> None:
    out = tmp_path / "bnb"
    done = fsdpq("quantize", "recipe.yaml", "--out", str(out), "--format", "bnb")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.is_loaded_in_4bit
    assert AutoTokenizer.from_pretrained(out)("a").input_ids
    again = fsdpq("quantize", "recipe.yaml", "--out", str(out), "--format", "bnb")
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr
