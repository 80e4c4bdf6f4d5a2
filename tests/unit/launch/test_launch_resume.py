"""Going on with a run, up to the start of its ranks: compared, refused, forced, recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_manifest
from support.screens import Lines
from support.tiny import tiny_recipe

from fsdpq.errors import CheckpointError, RecipeError, UsageError
from fsdpq.fetch.holds import hold
from fsdpq.launch import resume as module
from fsdpq.launch import train as train_module
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.resume import find_run, resume
from fsdpq.launch.runs import ownership
from fsdpq.launch.runs.run_dir import create_run_dir, newest_run_dir
from fsdpq.launch.train import train
from fsdpq.recipe.load import dump_recipe, load_recipe, load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line

INPUTS: dict[str, Any] = {
    "model": {"directory": "/m", "sha256": "b1", "revision": None, "source": "here"},
    "data": {"train": [], "eval": None, "chat_template": None},
    "prepared": {"directory": "/p", "digest": "d1", "key": {}},
}


class Started(list[dict[str, Any]]):
    """What the ranks were started with."""

    def start(self, files: RunFiles, recipe: Recipe, **arguments: Any) -> None:
        self.append({"files": files, "recipe": recipe, **arguments})


@pytest.fixture
def inputs() -> dict[str, Any]:
    """What is found for the recipe now; tests change it."""
    return json.loads(json.dumps(INPUTS))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]) -> Started:
    """A directory of our own, without a GPU, without ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = Started()
    for each in (module, train_module):
        monkeypatch.setattr(each, "gather_inputs", lambda *_args, **_kwargs: inputs)
        monkeypatch.setattr(each, "run_ranks", started.start)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "my.yaml").write_text(dump_recipe(tiny_recipe(launch={"nproc_per_node": "auto"})))
    return started


@pytest.fixture
def files(started: Started) -> RunFiles:
    """A run of ``my.yaml`` that began in ``run``."""
    assert started == []
    files = train(Path("my.yaml"), (), run_dir=Path("run"), screen=Lines())
    started.clear()
    return files


def resolved(files: RunFiles) -> Recipe:
    return load_resolved(files.resolved)


def lock_of(files: RunFiles) -> dict[str, Any]:
    return json.loads(files.lock.read_text())


def go_on(files: RunFiles, *overrides: str, force: bool = False) -> list[str]:
    screen = Lines()
    resume(files.root, overrides, screen=screen, force=force)
    return screen.lines


def finish(files: RunFiles) -> None:
    append_json_line(files.events, {"event": "done"})
    append_json_line(files.events, {"event": "phase", "name": "report"})
    files.report_html.touch()


def test_what_is_no_run_is_named(started: Started, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory"):
        resume(tmp_path, (), screen=Lines())
    assert started == []


def test_run_without_a_checkpoint_says_how_to_start_again(files: RunFiles) -> None:
    with pytest.raises(UsageError, match=r"`run` has no checkpoint") as error:
        go_on(files)
    assert "`fsdpq train my.yaml`" in error.value.hint
    assert "checkpoint.interval" in error.value.hint


def test_run_whose_checkpoints_cannot_be_read_is_named(files: RunFiles) -> None:
    save_manifest(files.checkpoints, 4)
    (files.checkpoints / "step-00000004" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000004 is damaged: manifest\.json"):
        go_on(files)


def test_a_run_goes_on_in_its_directory(files: RunFiles, started: Started) -> None:
    before = lock_of(files)
    save_manifest(files.checkpoints, 3, recipe=resolved(files))
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    go_on(files, "launch.nproc_per_node=4", "fsdp.strategy=ddp")
    [start] = started
    assert start["resumes"] is True
    assert start["files"].root == Path("run")
    assert resolved(files) == start["recipe"]
    assert resolved(files).launch.nproc_per_node == 4
    lock = lock_of(files)
    [entry] = lock.pop("resumes")
    assert (entry["step"], entry["world_size"], entry["forced"]) == (4, 4, [])
    assert entry["overrides"] == ["launch.nproc_per_node=4", "fsdp.strategy=ddp"]
    assert entry["versions"] == {}
    assert lock["auto"] == [], "the number of ranks is given now"
    assert lock["resolved"]["fsdp"]["strategy"] == "ddp"
    assert lock["provenance"].pop("fsdp.strategy") == "command line: fsdp.strategy=ddp"
    assert (
        lock["provenance"].pop("launch.nproc_per_node") == "command line: launch.nproc_per_node=4"
    )
    assert lock["provenance"].pop("launch.device") == before["provenance"].pop("launch.device")
    assert before["provenance"].pop("launch.nproc_per_node") == "auto"
    assert before["provenance"].pop("fsdp.strategy").startswith("my.yaml:")
    same = before.keys() - {"auto", "resolved"}
    assert {key: lock[key] for key in same} == {key: before[key] for key in same}
    go_on(files)
    assert [entry["step"] for entry in lock_of(files)["resumes"]] == [4, 4]


def test_the_machine_decides_again_what_it_decided(
    files: RunFiles, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lock_of(files)["auto"] == ["launch.nproc_per_node"]
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    monkeypatch.setattr("fsdpq.launch.machine.resolve.CPU_RANKS", 1)
    go_on(files)
    assert started[0]["recipe"].launch.nproc_per_node == 1
    assert started[0]["recipe"].training.global_batch_size == 8


def test_fewer_gpus_take_fewer_ranks(
    files: RunFiles, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = tiny_recipe(launch={"device": "cuda", "nproc_per_node": 8}, model={"dtype": "bf16"})
    lock = lock_of(files) | {"resolved": gpu.model_dump(mode="json"), "auto": []}
    files.lock.write_text(json.dumps(lock))
    gpus = ["GPU 0: H100", "GPU 1: H100"]
    monkeypatch.setattr(module, "list_gpus", lambda: gpus)
    monkeypatch.setattr("fsdpq.launch.ready.list_gpus", lambda: gpus)
    save_manifest(files.checkpoints, 4, recipe=gpu)
    lines = go_on(files)
    assert "note: 2 ranks instead of 8: this machine has no more GPUs" in lines
    assert started[0]["recipe"].launch.nproc_per_node == 2
    assert started[0]["recipe"].training.global_batch_size == 8
    with pytest.raises(RecipeError) as error:
        go_on(files, "launch.nproc_per_node=3")
    assert "does not divide into 3 ranks" in error.value.problems[0].message


def test_another_setting_is_refused_with_a_diff_and_forced_once(
    files: RunFiles, started: Started
) -> None:
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    before = files.resolved.read_bytes(), files.lock.read_bytes()
    with pytest.raises(UsageError) as error:
        go_on(files, "optimizer.lr=0.5")
    assert error.value.message == "`run` would go on as another run: `optimizer.lr` is another"
    assert "--force" in error.value.hint
    assert error.value.details.splitlines() == [
        "--- run/checkpoints/step-00000004",
        "+++ now",
        "",
        "optimizer.lr",
        "  -  0.001",
        "  +  0.5    command line: optimizer.lr=0.5",
    ]
    assert (files.resolved.read_bytes(), files.lock.read_bytes()) == before
    assert started == []
    lines = go_on(files, "optimizer.lr=0.5", force=True)
    assert "note: going on as another run: `optimizer.lr` was 0.001 and is 0.5" in lines
    [forced] = lock_of(files)["resumes"][-1]["forced"]
    assert (forced["what"], forced["now"]) == ("optimizer.lr", 0.5)
    go_on(files)
    assert len(started) == 2, "what the user insisted on is not asked again"
    assert lock_of(files)["resumes"][-1]["forced"] == [forced], "and stays on record"
    with pytest.raises(UsageError):
        go_on(files, "optimizer.lr=0.25")
    with pytest.raises(UsageError, match=r"4 settings are others"):
        go_on(files, "optimizer.lr=1", "training.seed=1", "adapter.rank=2", "training.steps=9")


def test_another_base_or_other_rows_are_refused(
    files: RunFiles, started: Started, inputs: dict[str, Any]
) -> None:
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    inputs["model"]["sha256"] = "b2"
    inputs["prepared"]["digest"] = "d2"
    with pytest.raises(UsageError) as error:
        go_on(files)
    assert "the rows are others" in error.value.message
    assert "the base model is another (sha256 b1 became b2)" in error.value.message
    assert error.value.details == ""
    go_on(files, force=True)
    forced = lock_of(files)["resumes"][-1]["forced"]
    assert [(entry["what"], entry["now"]) for entry in forced] == [
        ("the rows", "d2"), ("the base model", "b2"),
    ]  # fmt: skip
    assert len(started) == 1


def test_rows_that_are_not_prepared_ahead_are_told_apart_by_their_files(
    files: RunFiles, started: Started, inputs: dict[str, Any]
) -> None:
    del inputs["prepared"]
    source = {"files": [{"path": "/r", "sha256": "r1"}]}
    inputs["data"] = {"train": [source], "eval": None, "chat_template": None}
    files.lock.write_text(json.dumps(lock_of(files) | {"inputs": inputs}))
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    go_on(files)
    assert len(started) == 1
    with pytest.raises(UsageError, match=r"`data\.seq_len` is another"):
        go_on(files, "data.seq_len=64")
    source["files"][0]["sha256"] = "r2"
    with pytest.raises(UsageError, match="the files of rows are others"):
        go_on(files)


def test_what_the_checkpoint_was_made_with_counts(files: RunFiles, started: Started) -> None:
    save_manifest(files.checkpoints, 4, recipe=tiny_recipe(adapter={"rank": 16}))
    with pytest.raises(UsageError, match=r"`adapter\.rank` is another"):
        go_on(files)
    go_on(files, "adapter.rank=16")
    assert len(started) == 1


def test_a_finished_run_is_left_alone_and_can_be_made_longer(
    files: RunFiles, started: Started
) -> None:
    finish(files)
    lines = go_on(files)
    assert any("has finished: there is nothing left to do" in line for line in lines)
    assert any("training.steps=N --force" in line for line in lines)
    assert started == []
    save_manifest(files.checkpoints, 5, recipe=resolved(files))
    with pytest.raises(UsageError, match=r"`training\.steps` is another"):
        go_on(files, "training.steps=9")
    go_on(files, "training.steps=9", force=True)
    assert started[0]["recipe"].training.steps == 9
    append_json_line(files.events, {"event": "phase", "name": "data"})
    go_on(files)
    assert len(started) == 2, "it began again, and did not finish"


def test_a_run_that_was_killed_before_its_report_is_not_finished(
    files: RunFiles, started: Started
) -> None:
    save_manifest(files.checkpoints, 5, recipe=resolved(files))
    finish(files)
    files.report_html.unlink()
    go_on(files)
    assert len(started) == 1


def test_one_launcher_at_a_time(files: RunFiles, started: Started) -> None:
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    with ownership.owned(files, screen=Lines()):
        with pytest.raises(UsageError, match=rf"in use: process {os.getpid()} on \S+ trains it"):
            go_on(files)
        assert started == []
    go_on(files)
    assert len(started) == 1, "nothing stale is left"


def test_ranks_of_a_killed_launcher_are_waited_for(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "RANKS_TIMEOUT_S", 0.3)
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    screen = Lines()
    with hold(files.logs), pytest.raises(UsageError, match="are still at work in `run`"):
        resume(files.root, (), screen=screen)
    assert screen.lines[-1] == "waiting for the ranks of an earlier start to end"


AUTO = ("checkpoint.resume=auto",)


def test_auto_starts_goes_on_and_ends(started: Started) -> None:
    files = train(Path("my.yaml"), AUTO, run_dir=None, screen=Lines())
    assert "resumes" not in started[-1]
    assert files.root.parent == Path("runs")
    # Nothing was saved: it starts at the first step, in the same place.
    assert train(Path("my.yaml"), AUTO, run_dir=None, screen=Lines()).root == files.root
    assert "resumes" not in lock_of(files)
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    changed = (*AUTO, "launch.nproc_per_node=1", "checkpoint.interval=3")
    assert train(Path("my.yaml"), changed, run_dir=None, screen=Lines()).root == files.root
    [entry] = lock_of(files)["resumes"]
    assert (entry["step"], entry["overrides"]) == (4, list(changed))
    assert len(started) == 3
    finish(files)
    screen = Lines()
    assert train(Path("my.yaml"), AUTO, run_dir=None, screen=screen).root == files.root
    assert any("has finished" in line for line in screen.lines)
    assert len(started) == 3
    other = train(Path("my.yaml"), (*AUTO, "training.seed=5"), run_dir=None, screen=Lines())
    assert other.root != files.root, "another run has another directory"


def test_auto_in_a_given_directory_refuses_another_run(started: Started) -> None:
    files = train(Path("my.yaml"), AUTO, run_dir=Path("here"), screen=Lines())
    save_manifest(files.checkpoints, 4, recipe=resolved(files))
    with pytest.raises(UsageError) as error:
        train(Path("my.yaml"), (*AUTO, "training.seed=5"), run_dir=Path("here"), screen=Lines())
    assert "`training.seed` is another" in error.value.message
    assert "checkpoint.resume=never" in error.value.hint
    with pytest.raises(UsageError, match="exists and is not empty"):
        train(Path("my.yaml"), (), run_dir=Path("here"), screen=Lines())
    assert len(started) == 1


def test_auto_takes_over_a_directory_that_a_kill_left_half_made(started: Started) -> None:
    recipe = resolve_launch(load_recipe(Path("my.yaml")).recipe, num_gpus=0, num_cpus=2)
    half = RunFiles(Path("half"))
    half.logs.mkdir(parents=True)
    half.recipe.touch()
    assert find_run(recipe, half.root) is None
    assert list(half.root.iterdir()) == []
    half.root.joinpath("thesis.tex").touch()
    with pytest.raises(UsageError, match="exists and holds no run"):
        find_run(recipe, half.root)
    assert half.root.joinpath("thesis.tex").exists()
    assert started == []


def test_newest_directory_of_a_recipe_is_found(started: Started) -> None:
    recipe = resolve_launch(load_recipe(Path("my.yaml")).recipe, num_gpus=0, num_cpus=2)
    assert newest_run_dir(recipe) is None
    made = [create_run_dir(recipe, raw=b"", lock={}).root for _ in range(3)]
    assert newest_run_dir(recipe) == made[-1]
    assert newest_run_dir(tiny_recipe(training={"seed": 9})) is None
    assert started == []
