"""Prepared data in the cache, with a fake worker: made once, by content, whole or not at all."""

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

from fsdpq.errors import (
    EnvironmentProblemError,
    ExitCode,
    FetchError,
    FsdpqError,
    LaunchError,
    RecipeError,
    UsageError,
)
from fsdpq.fetch.cache_entries import list_entries
from fsdpq.fetch.holds import hold
from fsdpq.launch.inputs import prepare as launch_prepare
from fsdpq.launch.inputs.prepare import FoundData, prepare

ROOT = Path(__file__).parents[3]
WORKER = (str(Path(__file__).with_name("fake_preparer.py")),)
RECIPE = """\
version: 1
name: tiny
model: {name_or_path: model}
quantization: {kind: bnb}
data: {path: rows.jsonl, format: qna_no_ctx, seq_len: 64}
"""
IN_A_PROCESS = f"""
import sys
from fsdpq.cli.main import main
from fsdpq.launch.inputs import prepare
prepare.PREPARER = {WORKER}
main(["prepare", "recipe.yaml"])
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(launch_prepare, "PREPARER", WORKER)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_text(f"content of {name}")
    write_rows(tmp_path / "rows.jsonl", 5)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def write_rows(path: Path, count: int) -> None:
    rows = [{"question": f"{path.name} {index}", "answer": "yes"} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*overrides: str, **options: Any) -> tuple[FoundData, list[str]]:
    screen = Lines()
    return prepare(Path("recipe.yaml"), overrides, screen=screen, **options), screen.lines


def why(*overrides: str) -> str:
    """Returns why the data was prepared anew; empty where it was not."""
    _, lines = run(*overrides)
    [line] = [line for line in lines if line.startswith("preparing the data: ")] or [""]
    return line.removeprefix("preparing the data: ")


def calls(project: Path) -> int:
    path = project / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def left(project: Path) -> list[str]:
    """Drafts in the cache, and folders of the worker."""
    drafts = [path.name for path in (project / "cache").glob("prepared/.*.building-*")]
    return drafts + [path.name for path in project.glob("fsdpq-prepare-*")]


def test_second_run_uses_what_the_first_made(project: Path) -> None:
    first, lines = run(num_processes=3)
    assert lines[0] == "preparing the data: the cache has none of these rows"
    assert lines[1].startswith("prepared 5 rows of 5,000 tokens in ")
    assert (project / "calls").read_text().split()[1] == "3"
    again, lines = run()
    assert lines == ["the data is prepared already: 5 rows of 5,000 tokens"]
    assert again == first
    assert calls(project) == 1
    assert first.directory.parent == project / "cache" / "prepared"
    assert first.directory.name.startswith("rows-")
    assert next(entry.name for entry in list_entries()) == f"prepared/{first.directory.name}"
    assert left(project) == []


def test_miss_says_what_changed(project: Path) -> None:
    run()
    assert why("data.seq_len=128") == "data.seq_len was 64 and is 128"
    assert why("data.train_on_prompt=true") == "data.train_on_prompt was false and is true"
    assert why("data.max_rows=3") == "data.max_rows was null and is 3"
    assert why("training.seed=9") == ""  # nothing is drawn
    fraction = "data.eval_fraction was 0.0 and is 0.5; training.seed was null and is 0"
    assert why("data.eval_fraction=0.5") == fraction
    assert why("data.eval_fraction=0.5", "training.seed=9") == "training.seed was 0 and is 9"
    assert why("data.shuffle=true", "training.epochs=3") == ""  # says nothing about tokens
    (project / "model" / "tokenizer.json").write_text("another")
    assert why() == "the tokenizer is another (tokenizer.json)"
    (project / "model" / "generation_config.json").write_text("no part of a tokenizer")
    assert why() == ""


def test_file_edited_in_place_is_noticed_and_a_moved_one_is_not_read_again(project: Path) -> None:
    run()
    path = project / "rows.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("yes", "nah"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert why() == "rows.jsonl changed"
    path.rename(project / "moved.jsonl")
    assert why("data.path=moved.jsonl") == ""
    write_rows(project / "other.jsonl", 2)
    assert why("data.path=[moved.jsonl,other.jsonl]") == "other.jsonl is new"
    assert why("data.path=other.jsonl") == "moved.jsonl is not used any more"


def test_versions_and_our_own_code_are_part_of_the_key(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    real = launch_prepare.prepare_key

    def key_of_another_day(*arguments: Any, **options: Any) -> dict[str, Any]:
        key = real(*arguments, **options)
        versions = {**key["versions"], "tokenizers": "0.1"}
        return {**key, "versions": versions, "code": "edited"}

    monkeypatch.setattr(launch_prepare, "prepare_key", key_of_another_day)
    reason = why()
    assert reason.startswith("tokenizers was ")
    assert reason.endswith(" and is 0.1; fsdpq's own code for data changed")


def test_two_runs_at_once_prepare_once(project: Path) -> None:
    go = project / "go"
    environment = os.environ | {"FAKE_PREPARER": "wait for go", "FAKE_GO": str(go)}
    logs = [project / "first.log", project / "second.log"]
    started: list[subprocess.Popen[str]] = []
    for log in logs:
        with log.open("w") as err:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", IN_A_PROCESS], env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=err,
                )
            )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any("waiting for another process" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert calls(project) == 1
    assert left(project) == []


def start_waiting(project: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a preparation in a process of its own; returns it and its worker's process id."""
    environment = os.environ | {"FAKE_PREPARER": "wait"}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list((project / "cache").glob("prepared/.*/waits")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, int((project / "calls").read_text().split()[0])


def test_killed_preparation_leaves_nothing_that_is_taken_for_good(project: Path) -> None:
    process, worker = start_waiting(project)
    process.kill()
    process.communicate(timeout=60)
    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=30)
    assert not psutil.pid_exists(worker)  # it ends by itself
    assert len(list((project / "cache").glob("prepared/.*.building-*"))) == 1
    _, lines = run()
    assert lines[0] == "preparing the data: the cache has none of these rows"
    assert not list((project / "cache").glob("prepared/.*.building-*"))


def test_ctrl_c_ends_the_worker_and_leaves_nothing(project: Path) -> None:
    process, worker = start_waiting(project)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert b"stopped by SIGINT" in err
    assert not psutil.pid_exists(worker)
    assert left(project) == []


def test_damaged_entries_are_made_again(project: Path) -> None:
    found, _ = run()
    tokens = found.directory / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    _, lines = run()
    assert "`tokens.bin` has 39 bytes instead of 40" in "".join(lines)
    tokens.write_bytes(b"x" * 40)  # the size is right
    _, lines = run()
    assert "its content is not what was written" in "".join(lines)
    assert calls(project) == 3
    assert tokens.read_bytes() == bytes(40)
    assert run()[1] == ["the data is prepared already: 5 rows of 5,000 tokens"]


def test_damaged_entry_in_use_is_kept(project: Path) -> None:
    found, _ = run()
    (found.directory / "mask.bin").write_bytes(b"x" * 10)
    with hold(found.directory), pytest.raises(FsdpqError, match="is damaged") as caught:
        run()
    assert "end the run that uses it" in caught.value.hint
    assert found.directory.is_dir()


def test_worker_that_is_killed_is_explained(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PREPARER", "killed")
    with pytest.raises(LaunchError, match=r"the worker was killed \(SIGKILL\)") as caught:
        run()
    assert "--processes 1" in caught.value.hint
    assert left(project) == []


def test_bad_rows_arrive_with_their_places(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PREPARER", "bad row")
    with pytest.raises(RecipeError) as caught:
        run()
    [problem] = caught.value.problems
    assert problem.location is not None
    assert (problem.location.source, problem.location.line) == ("rows.jsonl", 3)
    assert (problem.message, problem.hint) == ("the template refuses it", "change the row")
    assert left(project) == []


def test_unexpected_errors_keep_the_log(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PREPARER", "bug")
    with pytest.raises(LaunchError, match="a disk that lies") as caught:
        run()
    [folder] = left(project)
    assert str(project / folder / "log") in caught.value.details
    assert (project / folder / "log").is_file()


def test_cache_that_cannot_be_written_is_an_environment_problem(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "file").touch()
    monkeypatch.setenv("FSDPQ_CACHE", str(project / "file"))
    with pytest.raises(EnvironmentProblemError, match="cannot be written") as caught:
        run()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "FSDPQ_CACHE" in caught.value.hint


def test_full_disk_is_said_before_the_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(FetchError, match="100 bytes free") as caught:
        run()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert calls(project) == 0


def test_old_entries_make_room(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run()
    os.utime(first.directory / "fsdpq-cache.json", (0, 0))
    second, _ = run("data.seq_len=128")
    held = sum(entry.num_bytes for entry in list_entries())
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", str(held))
    third, lines = run("data.seq_len=256")
    assert any(line.startswith(f"removed `prepared/{first.directory.name}`") for line in lines)
    assert not first.directory.exists()
    assert second.directory.exists()
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "1")
    fourth, lines = run("data.seq_len=32")
    assert "it is written all the same" in "".join(lines)
    assert fourth.directory.exists()
    assert third.directory.exists()


def test_made_up_rows_are_not_prepared() -> None:
    with pytest.raises(UsageError, match=r"nothing to prepare .* rows are made up"):
        run("data.format=dummy", "data.path=null")


def test_tokenizer_is_needed(project: Path) -> None:
    (project / "model" / "tokenizer.json").unlink()
    with pytest.raises(FetchError, match="has no tokenizer"):
        run()
