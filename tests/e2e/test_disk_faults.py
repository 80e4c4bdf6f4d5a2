"""A disk that fills up while a run writes to it: nothing that was trained is lost."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.screens import Lines

from fsdpq.launch.runs import run_dir
from fsdpq.launch.train import train
from fsdpq.run_files.beats import Beat
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.tensor_files.checkpoint_manifest import check_checkpoint, list_checkpoints

STEPS = 24
SETTINGS = [
    f"training.steps={STEPS}",
    "checkpoint.interval=5",
    "data.eval_fraction=0",
    "metrics.sample_prompts=[]",
    "metrics.sample_max_new_tokens=48",
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here: it needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDPQ_CACHE", environment["FSDPQ_CACHE"])
    monkeypatch.setattr(run_dir, "MIN_FREE_BYTES", 1 << 20)


def wait_for(files: RunFiles, *, step: int = 0, phase: str = "train") -> None:
    """Waits until rank 0 does a step, or is in a phase, by its heartbeat."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        path = files.heartbeat(0)
        if path.exists() and path.stat().st_size:
            beat = Beat.unpack(path.read_bytes())
            if beat.phase == phase and beat.step >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"rank 0 did not come to {phase}, step {step}")


def fill(folder: Path) -> Path:
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def steps_of(files: RunFiles) -> list[int]:
    return [row["step"] for row in read_json_lines(files.metrics) if row["event"] == "step"]


@pytest.mark.usefixtures("settings")
def test_a_disk_that_is_full_until_the_end_costs_nothing(project: Path, small_disk: Path) -> None:
    """Full during checkpoints and metrics, and still when the adapter is to be written."""
    files, screen = RunFiles(small_disk / "run"), Lines()
    faults: list[BaseException] = []

    def be_full() -> None:
        try:
            wait_for(files, step=8)
            filler = fill(small_disk)
            wait_for(files, phase="export")
            assert max(steps_of(files)) < STEPS, "the disk was full"
            time.sleep(0.5)
            filler.unlink()
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=be_full)
    thread.start()
    train(project / "recipe.yaml", SETTINGS, run_dir=files.root, screen=screen)
    thread.join()
    assert not faults
    assert any("is full: make room: training goes on" in line for line in screen.lines)
    assert steps_of(files) == list(range(1, STEPS + 1)), "no row is lost, none is torn"
    notices = [row["message"] for row in read_json_lines(files.events) if row["event"] == "notice"]
    assert any("could not be saved" in text and "No space left" in text for text in notices)
    assert any("what is trained cannot be written" in text for text in notices)
    assert check_checkpoint(list_checkpoints(files.checkpoints)[0]).step == 5
    assert (files.adapter / "adapter_model.safetensors").exists()
    assert files.report_html.exists()


@pytest.mark.usefixtures("settings")
def test_a_run_directory_that_is_removed_is_made_anew(project: Path, tmp_path: Path) -> None:
    """The next checkpoint brings back what resuming needs; the adapter comes where it should."""
    files, screen = RunFiles(tmp_path / "run"), Lines()
    faults: list[BaseException] = []

    def remove() -> None:
        try:
            wait_for(files, step=8)
            files.root.rename(tmp_path / "removed")  # at once, as an unmounted disk goes
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=remove)
    thread.start()
    train(project / "recipe.yaml", SETTINGS, run_dir=files.root, screen=screen)
    thread.join()
    assert not faults
    assert (files.adapter / "adapter_model.safetensors").exists()
    saved = check_checkpoint(list_checkpoints(files.checkpoints)[0])
    assert saved.step == STEPS
    assert files.lock.exists()
    assert files.resolved.exists()
    assert files.report_html.exists()
