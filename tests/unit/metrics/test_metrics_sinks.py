"""JSON lines, TensorBoard, memory rows, traces."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fsdpq.metrics.held import StepHeld
from fsdpq.metrics.memory import MemoryLog
from fsdpq.metrics.profile import StepProfiler
from fsdpq.metrics.sinks import JsonlSink, ManySinks, TensorboardSink
from fsdpq.recipe.sections.output import ProfileOptions
from fsdpq.run_files.writing import read_json_lines

CPU = torch.device("cpu")
STEP = {"event": "step", "step": 3, "total_steps": 9, "loss": 1.5, "grad_norm": None, "lr": 1e-3}
EVAL = {"event": "eval", "step": 3, "loss": 1.25, "perplexity": 3.5}


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    sink = TensorboardSink(tmp_path, notify=pytest.fail)
    sink.write(STEP)
    sink.write(EVAL)
    sink.finish()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "eval/loss",
        "eval/perplexity",
    }
    [loss] = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, 1.5)


def test_a_full_disk_ends_tensorboard_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sink = TensorboardSink(tmp_path, notify=told.append)
    sink.write({"event": "step", "step": 1, "loss": 2.0})

    def refuse(_writer: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", refuse)
    for step in (2, 3):
        sink.write({"event": "step", "step": step, "loss": 2.0})
    sink.go_on_after(1)
    sink.finish()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert "metrics.jsonl" in told[0]


def test_a_resumed_run_hides_the_later_rows_of_tensorboard(tmp_path: Path) -> None:
    for loss, resumed_after in ((1.5, None), (2.5, 2)):
        sink = TensorboardSink(tmp_path, notify=pytest.fail)
        if resumed_after is not None:
            ManySinks([sink]).go_on_after(resumed_after)
        for step in (2, 3) if resumed_after is None else (3,):
            sink.write({**STEP, "step": step, "loss": loss})
        sink.finish()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 1.5), (3, 2.5)]


def test_rows_wait_for_a_disk_that_takes_none(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    sink = JsonlSink(path)
    path.parent.rename(tmp_path / "elsewhere")
    for step in (2, 3):
        sink.write({"event": "step", "step": step})
    (tmp_path / "elsewhere").rename(path.parent)
    sink.finish()
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3]
    sink.write({"event": "step", "step": 4})
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3, 4]


def test_a_line_that_was_cut_by_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """``RLIMIT_FSIZE`` refuses the bytes beyond a size, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", CUT, str(path)], check=True, capture_output=True)
    assert b"takes no rows, they wait" in done.stderr
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3]


CUT = """
import resource, signal, sys
from pathlib import Path
from fsdpq.metrics.sinks import JsonlSink
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = JsonlSink(path)
sink.write({"event": "step", "step": 1})
size, (_, hard) = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
sink.write({"event": "step", "step": 2})
assert path.stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sink.write({"event": "step", "step": 3})
"""


class ListSink:
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


def test_a_peak_belongs_to_its_phase() -> None:
    sink = ListSink()
    log = MemoryLog(sink, CPU)
    log("load")
    ballast = torch.ones(64 << 20, dtype=torch.uint8)
    size = ballast.nbytes
    del ballast
    log("forward")
    log("backward")
    assert [row["phase"] for row in sink.rows] == ["load", "forward", "backward"]
    load, forward, backward = sink.rows
    # Resident pages of other allocations may come and go meanwhile.
    assert forward["peak_bytes"] - load["bytes"] > 0.9 * size
    assert forward["bytes"] - load["bytes"] < 0.5 * size
    assert backward["peak_bytes"] - load["bytes"] < 0.5 * size
    assert log.highest >= forward["peak_bytes"]
    assert forward["anonymous_bytes"] < forward["bytes"]


@pytest.mark.parametrize(("every_step", "measured"), [(False, [1, 2]), (True, [1, 2, 3])])
def test_the_first_two_steps_are_measured_or_all(every_step: bool, measured: list[int]) -> None:
    sink = ListSink()
    log = MemoryLog(sink, CPU, every_step=every_step)
    log("init")
    for number in (1, 2, 3):
        if log.begin_step(number):
            for _micro_batch in range(2):
                log("forward")
                log("backward")
            log("optimizer")
            log.end_step({}, tokens=1)
    phases = ["forward", "backward", "optimizer", None]
    found = [(row.get("step"), row.get("phase")) for row in sink.rows]
    assert found == [(None, "init"), *((number, phase) for number in measured for phase in phases)]


def test_what_tensors_hold_is_counted_by_what_it_is_for() -> None:
    model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(6, 4), "trained": torch.nn.Linear(4, 3)})
    model["frozen"].requires_grad_(requires_grad=False)
    for name, size in (("codes", 30), ("absmax", 7)):
        packed = torch.nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)
        model["frozen"].register_parameter(name, packed)
    optimizer = torch.optim.AdamW(model["trained"].parameters())
    held = StepHeld(model, optimizer, CPU)
    model["trained"](model["frozen"](torch.ones(2, 6))).sum().backward()
    held.end_phase("backward")
    optimizer.step()
    optimizer.zero_grad()
    trained = 4 * (3 * 4 + 3)
    expected = {"codes": 30, "scales": 7, "plain": 4 * (4 * 6 + 4), "trained": trained}
    expected |= {"gradients": trained, "optimizer": 2 * trained + 2 * 4}  # a step count a tensor
    assert held.all() == {"device": expected}


@pytest.mark.parametrize("num_steps", [4, 9])
def test_the_asked_steps_are_traced(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "profile" / "rank-0.json"
    profiler = StepProfiler(ProfileOptions(start_step=3, num_steps=3), path, CPU)
    for step in range(1, num_steps + 1):
        with profiler.tracing(step):
            torch.ones(4, 4) @ torch.ones(4, 4)
    profiler.finish()
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    expected = range(3, min(num_steps, 5) + 1)
    steps = {name for name in names if name.startswith("step ")}
    assert steps == {f"step {step}" for step in expected}
    assert names.count("aten::mm") == len(expected)
