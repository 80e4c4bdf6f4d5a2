"""Ranks that are started again: when, from what, and what they leave behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_manifest
from support.screens import Lines
from support.tiny import tiny_recipe

from fsdpq.errors import (
    EnvironmentProblemError,
    FsdpqError,
    LaunchError,
    Problem,
    RecipeError,
    RunStoppedError,
)
from fsdpq.launch.ranks.failure import read_rank_errors
from fsdpq.launch.ranks.restarts import (
    clear_for_start,
    cut_half_line,
    may_pass,
    name_way_back,
    restart_text,
)
from fsdpq.launch.ranks.torchrun import JsonLinesTail
from fsdpq.launch.run_ranks import run_ranks
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

WORKER = (str(Path(__file__).with_name("fake_worker.py")),)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "logs").mkdir()
    return RunFiles(tmp_path)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def record(files: RunFiles, rank: int, **changes: Any) -> None:
    row = {
        "rank": rank, "kind": "RuntimeError", "message": "no such thing", "hint": "",
        "traceback": "Traceback ...", "exit_code": 1, "time": 1.0,
    }  # fmt: skip
    files.rank_error(rank).write_text(json.dumps(row | changes))


def run(
    files: RunFiles, mode: str, monkeypatch: pytest.MonkeyPatch, limit: int, **launch: Any
) -> Lines:
    """Runs two fake ranks with so many restarts."""
    monkeypatch.setenv("FAKE_MODE", mode)
    recipe, screen = tiny_recipe(launch={"max_restarts": limit, **launch}), Lines()
    try:
        run_ranks(files, recipe, inputs={}, screen=screen, worker=WORKER)
    except FsdpqError as error:
        screen.lines.append(str(error))
    return screen


@pytest.mark.parametrize("has_endpoint", [False, True])
def test_a_killed_rank_restarts_and_its_end_is_put_away(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, has_endpoint: bool
) -> None:
    save_manifest(files.checkpoints, 40)
    endpoint = f"127.0.0.1:{free_port()}" if has_endpoint else None
    screen = run(files, "kill-once", monkeypatch, 2, rdzv_endpoint=endpoint)
    assert screen.lines == [
        "rank 1 was killed (SIGKILL): restart 1 of 2, going on from step 40",
    ]
    assert (files.root / "arguments-1").read_text().count("--resume") == 1
    assert (files.attempt(1) / "rank-0.error.json").exists()
    assert "SIGKILL" in (files.attempt(1) / "torchrun.log").read_text()
    assert not list(files.logs.glob("rank-*.error.json"))
    assert len(list(read_json_lines(files.metrics))) == 6, "rows are appended to"


def test_a_mistake_that_would_come_again_is_not_repeated(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = run(files, "own-error", monkeypatch, 3)
    [line] = screen.lines
    assert line.startswith("the loss is nan at step 3")
    assert not files.attempt(1).exists()
    report = json.loads(files.report_json.read_text())
    assert report["status"] == "failed"
    assert report["error"]["message"].startswith("the loss is nan at step 3")


def test_without_a_checkpoint_the_rows_start_anew(files: RunFiles) -> None:
    files.metrics.write_text('{"event": "step", "step": 1}\n')
    files.events.write_text('{"event": "notice"}\n')
    clear_for_start(files)
    assert not files.metrics.exists()
    assert (files.attempt(1) / files.metrics.name).exists()
    clear_for_start(files)
    assert not files.attempt(2).exists(), "nothing was left"
    files.torchrun_log.touch()
    clear_for_start(files)
    assert (files.attempt(2) / files.torchrun_log.name).exists()


@pytest.mark.parametrize(
    ("error", "changes", "expected"),
    [
        (LaunchError("rank 1 was killed (SIGKILL)"), None, True),
        (LaunchError("the ranks hang"), None, True),
        (LaunchError("rank 0 failed: RuntimeError: CUDA error"), {}, True),
        (LaunchError("the loss is nan"), {"kind": "TrainingError", "traceback": ""}, False),
        (EnvironmentProblemError("the disk is full"), None, False),
        (RecipeError([Problem("no")]), {}, False),
        (RunStoppedError("stopped by SIGTERM"), None, False),
    ],
)
def test_only_what_may_pass_is_tried_again(
    files: RunFiles, error: FsdpqError, changes: dict[str, Any] | None, expected: bool
) -> None:
    if changes is not None:
        record(files, 0, **changes)
    assert may_pass(error, read_rank_errors(files)) is expected


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b"', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n'),
        (b'{"a": 1}\n\0\0\0\0\0', b'{"a": 1}\n'),
        (b'{"a": "\xc3\xa9"}\n{"b": "\xc3', b'{"a": "\xc3\xa9"}\n'),
        (b"\0\0\0\n", b""),
    ],
)
def test_half_a_row_at_the_end_is_cut_off(tmp_path: Path, content: bytes, kept: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    cut_half_line(path)
    assert path.read_bytes() == kept


def test_rows_of_an_earlier_start_are_not_shown_again(files: RunFiles) -> None:
    files.events.write_text('{"event": "done"}\n')
    tail = JsonLinesTail(files.events)
    assert list(tail.read_new()) == []
    with files.events.open("a") as file:
        file.write('{"event": "phase"}\n')
    assert list(tail.read_new()) == [{"event": "phase"}]


def test_a_failure_names_the_way_back(files: RunFiles) -> None:
    def hint(error: FsdpqError) -> str:
        name_way_back(files, error)
        return error.hint

    assert hint(LaunchError("killed", hint="use less memory")) == "use less memory"
    save_manifest(files.checkpoints, 40)
    way = f"go on from step 40 with `fsdpq resume {files.root}`"
    assert hint(LaunchError("killed", hint="use less memory")) == f"use less memory; {way}"
    assert hint(LaunchError("killed")) == way


def test_a_restart_says_where_it_goes_on(files: RunFiles) -> None:
    error = LaunchError("rank 0 failed: ValueError: boom")
    text: Callable[[], str] = lambda: restart_text(files, error, number=2, limit=3)  # noqa: E731
    assert text() == "rank 0 failed: ValueError: boom: restart 2 of 3, from the first step"
    save_manifest(files.checkpoints, 7)
    save_manifest(files.checkpoints, 9)
    (files.checkpoints / "step-00000009" / "manifest.json").write_text("{}")
    assert text().endswith("restart 2 of 3, going on from step 7"), "the newest is damaged"
