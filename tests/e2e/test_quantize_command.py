"""The quantized base with the real worker: made once, loaded again, the same losses bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import pytest
from support.commands import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdpq.cli.screen import PlainScreen
from fsdpq.errors import FsdpqError
from fsdpq.launch.train import train
from fsdpq.plan import base_file
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
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
    monkeypatch.setattr(base_file, "MIN_BASE_BYTES", 0)


def losses(run_dir: Path, *overrides: str) -> list[float]:
    with (run_dir.parent / f"{run_dir.name}.txt").open("w") as stream:
        screen = PlainScreen(stream)
        files = train(Path("recipe.yaml"), [*SHORT, *overrides], run_dir=run_dir, screen=screen)
    return losses_of(files)


def losses_of(files: RunFiles) -> list[float]:
    return [row["loss"] for row in read_json_lines(files.metrics) if row["event"] == "step"]


@pytest.mark.timeout(900)  # four runs and a command, each of which starts ranks
def test_training_from_a_base_is_the_same_wherever_it_lies(fsdpq: Run, tmp_path: Path) -> None:
    streamed = losses(tmp_path / "streamed", "quantization.cache=false")
    assert not (tmp_path / "cache" / "bases").exists()
    assert losses(tmp_path / "first") == streamed
    (base,) = (path for path in (tmp_path / "cache" / "bases").glob("*") if path.is_dir())
    made = (base / WEIGHTS_NAME).stat().st_mtime_ns
    assert losses(tmp_path / "second", "fsdp.offload=disk") == streamed
    assert "quantizing" in (tmp_path / "first.txt").read_text()
    assert "quantizing" not in (tmp_path / "second.txt").read_text()
    assert (base / WEIGHTS_NAME).stat().st_mtime_ns == made
    assert str(base) in RunFiles(tmp_path / "second").lock.read_text()

    out = tmp_path / "out"
    done = fsdpq("quantize", "recipe.yaml", "--out", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert (out / WEIGHTS_NAME).read_bytes() == (base / WEIGHTS_NAME).read_bytes()
    overrides = [f"model.name_or_path={out}", "fsdp.offload=disk", "training.steps=300"]
    with (tmp_path / "third.txt").open("w") as stream:
        screen = Vandal(stream, out / WEIGHTS_NAME)
        with pytest.raises(FsdpqError) as caught:
            train(
                Path("recipe.yaml"), [*SHORT, *overrides], run_dir=tmp_path / "third", screen=screen
            )
    assert f"{WEIGHTS_NAME} was changed while this run uses it: bytes " in caught.value.message
    assert caught.value.hint.startswith(f"delete `{out}` and make it again")
    assert losses_of(RunFiles(tmp_path / "third"))[:2] == streamed


class Vandal(PlainScreen):
    """Changes a byte of a file once two steps are done."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def show_row(self, row: dict[str, Any]) -> None:
        super().show_row(row)
        if row["event"] == "step" and row["step"] == 2:
            with self._path.open("r+b") as file:
                file.seek(100_000)
                byte = file.read(1)[0]
                file.seek(100_000)
                file.write(bytes([byte ^ 1]))


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
