"""`fsdpq quantize` under a real torchrun with a fake rank: a whole directory or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.screens import Lines

from fsdpq.errors import FsdpqError, UsageError
from fsdpq.launch import quantize as launch_quantize
from fsdpq.launch.quantize import quantize
from fsdpq.run_files.paths import RunFiles

ROOT = Path(__file__).parents[3]
WORKER = (str(Path(__file__).with_name("fake_quantizer.py")),)
RECIPE = """\
version: 1
name: tiny
model: {name_or_path: model, dtype: fp32}
quantization: {kind: bnb}
data: {format: dummy}
launch: {nproc_per_node: 1, device: cpu}
"""
IN_A_PROCESS = f"""
import sys
from pathlib import Path
from fsdpq.cli.screen import PlainScreen
from fsdpq.launch.quantize import quantize
quantize(Path("recipe.yaml"), [], out=Path("out"), screen=PlainScreen(sys.stderr), worker={WORKER})
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_text(f"content of {name}")
    header = b'{"weight":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    weights = len(header).to_bytes(8, "little") + header + b"abcd"
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    (tmp_path / "model" / "modeling.py").write_text("code")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(*overrides: str, output: str = "fsdpq") -> tuple[Path, list[str]]:
    screen = Lines()
    out = quantize(
        Path("recipe.yaml"), overrides, out=Path("out"), screen=screen, worker=WORKER, output=output
    )  # fmt: skip
    return out, screen.lines


def calls(project: Path) -> int:
    return len((project / "calls").read_text().splitlines())


def left(project: Path) -> list[str]:
    """Drafts, and run directories of the ranks."""
    return [path.name for path in project.glob(".out.*")] + [
        path.name for path in project.glob("fsdpq-quantize-*")
    ]


def start(project: Path) -> subprocess.Popen[bytes]:
    """Starts it in a process of its own, and waits until a rank writes."""
    environment = os.environ | {"FAKE_QUANTIZER": "wait"}
    process = subprocess.Popen([sys.executable, "-c", IN_A_PROCESS], env=environment)
    deadline = time.monotonic() + 120
    while not list(project.glob(".out.*/base.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_killed_launcher_leaves_nothing_that_the_next_start_takes_for_whole(project: Path) -> None:
    process = start(project)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(timeout=60)
    for child in tree:  # a real rank ends by itself when its launcher is gone
        child.kill()
    assert not (project / "out").exists()
    assert len(list(project.glob(".out.*"))) == 1
    (project / "calls").unlink()

    out, _ = run()
    assert sorted(path.name for path in out.iterdir()) == [
        "base.json", "base.safetensors", "chat_template.jinja", "checksums.bin", "config.json",
        "tokenizer.json",
    ]  # fmt: skip
    assert (out / "base.safetensors").stat().st_size == 1000
    assert (out / "config.json").read_text() == "content of config.json"
    assert list(project.glob(".out.*")) == []
    again, lines = run("training.seed=9")
    assert (again, lines) == (out, ["`out` holds this base already"])
    with pytest.raises(UsageError, match="block_size 64, the recipe says 128"):
        run("quantization.block_size=128")
    assert calls(project) == 1


def test_ctrl_c_ends_the_ranks_and_leaves_nothing(project: Path) -> None:
    process = start(project)
    rank = int((project / "calls").read_text())
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert not (project / "out").exists()
    assert left(project) == []
    assert not psutil.pid_exists(rank)


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        ({"message": "the disk is full", "exit_code": 4}, 1, "the disk is full"),
        (None, 0, "the ranks ended without a quantized base"),
    ],
)
def test_ranks_that_fail_leave_no_directory(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: dict[str, Any] | None,
    exit_code: int,
    message: str,
) -> None:
    def end(files: RunFiles, *_args: object, **_kwargs: object) -> tuple[int, str]:
        fields = {"rank": 0, "kind": "E", "hint": "", "traceback": "", "time": 0.0}
        if error is not None:
            files.rank_error(0).write_text(json.dumps(fields | error))
        return exit_code, ""

    monkeypatch.setattr(launch_quantize, "run_torchrun", end)
    with pytest.raises(FsdpqError, match=message) as caught:
        run()
    assert caught.value.exit_code == (4 if error else 1)
    assert not (project / "out").exists()
    (logs,) = left(project)
    assert (project / logs / "logs").is_dir(), "what the message names is kept"


@pytest.mark.parametrize("name", ["file", "full"])
def test_place_that_holds_something_is_refused_before_anything_is_fetched(
    project: Path, name: str
) -> None:
    if name == "file":
        (project / "out").write_text("")
    else:
        (project / "out").mkdir()
        (project / "out" / "thesis.tex").write_text("")
    with pytest.raises(UsageError) as caught:
        run("model.name_or_path=org/no-such-model")
    assert "`out`" in caught.value.message
    assert "--out" in caught.value.hint


def test_hqq_has_no_format_of_bitsandbytes(project: Path) -> None:
    text = (project / "recipe.yaml").read_text()
    (project / "recipe.yaml").write_text(text.replace("kind: bnb", "kind: hqq"))
    with pytest.raises(UsageError, match=r"`quantization.kind` is `hqq`"):
        run(output="bnb")
