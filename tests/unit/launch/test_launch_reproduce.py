"""A run again from its lock: what changed is reported first; other inputs are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.screens import Lines

from fsdpq.errors import RecipeError, UsageError
from fsdpq.launch import reproduce as module
from fsdpq.launch import train as train_module
from fsdpq.launch.inputs import prepare
from fsdpq.launch.reproduce import ReproduceOptions, Reproduction, compare_losses, reproduce
from fsdpq.launch.runs.drift import DriftReport, compare_locks
from fsdpq.launch.runs.recorded import open_recorded
from fsdpq.launch.train import train
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line

RECIPE = """\
version: 1
name: tiny
model: {name_or_path: model, dtype: fp32}
data: {path: rows.jsonl, eval: {path: held-out.jsonl}}
launch: {nproc_per_node: 1, device: cpu}
"""
ROW = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FAKE_LOSSES", "[3.0, 2.5]")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    preparer = (str(Path(__file__).with_name("fake_preparer.py")),)
    monkeypatch.setattr(prepare, "PREPARER", preparer)
    monkeypatch.setattr(train_module, "run_ranks", log_losses)
    (folder / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "model" / name).write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("rows.jsonl", "held-out.jsonl"):
        (folder / name).write_text(ROW)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def log_losses(files: RunFiles, *_arguments: Any, **_options: Any) -> None:
    """Leaves what ranks leave whose losses are ``FAKE_LOSSES``."""
    for step, loss in enumerate(json.loads(os.environ["FAKE_LOSSES"]), start=1):
        append_json_line(files.metrics, {"event": "step", "step": step, "loss": loss})


@pytest.fixture
def run(project: Path) -> RunFiles:
    """A run whose recipe file is gone."""
    files = train(Path("recipe.yaml"), ["training.seed=5"], run_dir=None, screen=Lines())
    (project / "recipe.yaml").unlink()
    return RunFiles(files.root.absolute())


def again(run: RunFiles, **options: Any) -> tuple[Reproduction, list[DriftReport]]:
    """Reproduces a run; returns also what was told before it ran."""
    reports: list[DriftReport] = []
    given = ReproduceOptions(**options)
    done = reproduce(run.root, given, screen=Lines(), on_drift=reports.append)
    return done, reports


def edit_lock(run: RunFiles, **changes: Any) -> None:
    run.lock.write_text(json.dumps(json.loads(run.lock.read_text()) | changes))


def test_the_lock_alone_is_enough_and_equal_losses_are_called_identical(run: RunFiles) -> None:
    done, reports = again(run)
    assert [report.rows for report in reports] == [()]
    assert done.files is not None
    assert done.files.root != run.root
    assert done.files.resolved.read_bytes() == run.resolved.read_bytes()
    assert "seed: 5" in done.files.resolved.read_text()
    places = [json.loads(files.lock.read_text())["provenance"] for files in (run, done.files)]
    assert places[0] == places[1]
    assert places[0]["training.seed"] == "command line: training.seed=5"
    assert done.losses is not None
    assert (done.losses.num_compared, done.losses.identical) == (2, True)


def test_the_largest_difference_is_found(run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOSSES", "[3.001, 2.4, 2.0]")
    losses = again(run)[0].losses
    assert losses is not None
    assert (losses.step, losses.then, losses.now) == (2, 2.5, 2.4)
    assert (losses.num_missing, losses.identical) == (1, False)


def test_of_a_step_that_was_logged_twice_the_last_row_counts(tmp_path: Path) -> None:
    rows = [{"event": "step", "step": step, "loss": loss} for step, loss in ((1, 9.0), (1, 3.0))]
    for name, chosen in (("a", rows), ("b", rows[1:])):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    losses = compare_losses(RunFiles(tmp_path / "a"), RunFiles(tmp_path / "b"))
    assert losses is not None
    assert losses.identical
    assert compare_losses(RunFiles(tmp_path / "a"), RunFiles(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("damage", "what", "now"),
    [
        ("change rows.jsonl", "data", "rows.jsonl"),
        ("change held-out.jsonl", "data.eval", "held-out.jsonl"),
        ("remove rows.jsonl", "data", "rows.jsonl` is not there"),
        ("change model/tokenizer.json", "model", "model"),
        ("remove model/config.json", "model", "`config.json` is missing"),
    ],
)
def test_other_inputs_are_named_and_refused(
    run: RunFiles, project: Path, damage: str, what: str, now: str
) -> None:
    verb, _, name = damage.partition(" ")
    if verb == "change":
        (project / name).write_text((project / name).read_text() + "\n")
    else:
        (project / name).unlink()
    found = again(run, check=True)[0].drift
    assert found.matters
    (row,) = found.at("inputs")
    assert row.what == what
    assert now in row.now
    num_runs = len(list((project / "runs").iterdir()))
    with pytest.raises(UsageError, match=f"other inputs: `{what}`") as refused:
        again(run)
    assert "--force" in refused.value.hint
    assert len(list((project / "runs").iterdir())) == num_runs


def test_force_runs_with_what_is_there(run: RunFiles, project: Path) -> None:
    (project / "rows.jsonl").write_text(ROW * 2)
    done, reports = again(run, force=True)
    assert done.files is not None
    assert [[row.what for row in report.rows] for report in reports] == [["data"]]
    (project / "rows.jsonl").unlink()
    with pytest.raises(RecipeError):
        again(run, force=True)


def test_a_moved_project_is_found_by_base_dir(run: RunFiles, project: Path) -> None:
    moved = project.parent / "moved"
    shutil.move(project / "model", moved / "model")
    for name in ("rows.jsonl", "held-out.jsonl"):
        shutil.move(project / name, moved / name)
    assert len(again(run, check=True)[0].drift.at("inputs")) == 2
    assert again(run, check=True, base_dir=moved)[0].drift.rows == ()


def test_prepared_rows_that_come_out_otherwise_stop_the_run(run: RunFiles) -> None:
    inputs = json.loads(run.lock.read_text())["inputs"]
    inputs["prepared"]["digest"] = "0" * 64
    edit_lock(run, inputs=inputs)
    assert again(run, check=True)[0].drift.rows == ()
    with pytest.raises(UsageError, match="other inputs: `prepared rows`"):
        again(run)
    assert again(run, force=True)[0].files is not None


def test_versions_hardware_and_environment_are_compared(run: RunFiles) -> None:
    lock = json.loads(run.lock.read_text())
    packages = lock["packages"] | {"torch": "2.12.0", "pyyaml": "5.0", "nvidia-nccl-cu12": "2.27"}
    hardware = lock["hardware"] | {"cpu": "another", "gpus": ["GPU 0: H100 (UUID: x)"]}
    edit_lock(
        run, packages=packages, hardware=hardware, environment={"MKL_CBWR": "AVX2"}, world_size=8
    )
    found = again(run, check=True)[0].drift
    rows = {row.what: (row.then, row.level) for row in found.rows}
    assert rows["torch"] == ("2.12.0", "numbers")
    assert rows["pyyaml"] == ("5.0", "note")
    assert rows["GPUs"] == ("H100", "numbers")
    assert rows["CPU"] == ("another", "numbers")
    assert rows["$MKL_CBWR"] == ("AVX2", "numbers")
    assert rows["$OMP_NUM_THREADS"][0] == "none"
    assert rows["world size"] == ("8", "numbers")
    assert "nvidia-nccl-cu12" not in rows
    assert found.num_unknown == 1
    assert found.matters


def test_gpus_are_the_same_whatever_their_serial_numbers() -> None:
    locks = [{"hardware": {"gpus": [f"GPU {n}: H100 (UUID: {n})"]}} for n in (0, 1)]
    assert compare_locks(*locks) == DriftReport((), 1)


def test_fewer_gpus_run_fewer_ranks(run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = json.loads(run.lock.read_text())["resolved"]
    resolved["launch"] |= {"device": "cuda", "nproc_per_node": 4}
    edit_lock(run, resolved=resolved, world_size=4)
    for num_gpus, num_ranks in ((2, "2"), (3, "2"), (1, "1")):
        gpus = [f"GPU {number}: X" for number in range(num_gpus)]
        monkeypatch.setattr(module, "list_gpus", lambda found=gpus: found)
        rows = {row.what: (row.then, row.now) for row in again(run, check=True)[0].drift.rows}
        assert rows["world size"] == ("4", num_ranks), "the batch of 16 rows divides by so many"


def test_models_and_datasets_are_pinned_to_the_recorded_commits(run: RunFiles) -> None:
    lock = json.loads(run.lock.read_text())
    lock["resolved"]["model"]["name_or_path"] = "org/model"
    lock["resolved"]["data"] |= {
        "path": None,
        "mixture": [{"dataset": "org/a", "revision": "main"}, {"path": "rows.jsonl"}],
        "eval": {"dataset": "org/b"},
    }
    inputs = {
        "model": {"revision": "m1"},
        "data": {
            "train": [
                {"key": "data.mixture.0", "revision": "a1"},
                {"key": "data.mixture.1", "revision": None},
            ],
            "eval": {"key": "data.eval", "revision": "b1"},
        },
    }
    edit_lock(run, resolved=lock["resolved"], inputs=inputs)
    loaded = open_recorded(run.lock).load()
    recipe, sources = loaded.recipe, loaded.recorded_sources
    assert sources is not None
    pinned = [key for key, place in sources.items() if place == "run.lock.json"]
    assert pinned == ["model.revision", "data.eval.revision", "data.mixture.0.revision"]
    assert recipe.model.revision == "m1"
    assert [part.revision for part in recipe.data.mixture or ()] == ["a1", None]
    assert recipe.data.eval is not None
    assert recipe.data.eval.revision == "b1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoke": True}, "smoke run"),
        ({"trust_remote_code": True}, "ran Python code"),
        ({"format": 99}, "in format 99"),
        ({"resolved": []}, "no `resolved`"),
        ({"base_dir": None}, "no `base_dir`"),
        ({"inputs": "x"}, "no `inputs`"),
    ],
)
def test_a_lock_that_cannot_be_done_again_says_why(
    run: RunFiles, changes: dict[str, Any], message: str
) -> None:
    edit_lock(run, **changes)
    with pytest.raises(UsageError, match=message):
        again(run, check=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"fsdpq": "0.1.0"}'])
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run\.lock\.json"):
        open_recorded(path)
    with pytest.raises(UsageError, match="cannot be read"):
        open_recorded(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"trust_remote_code": True}, "`trust_remote_code` is not for a recipe"),
        ("adapter", {"_target_": "os.system"}, "names code to run"),
        ("data", {"path": "http://x/rows.jsonl"}, "on the network"),
        ("name", "../x", "name"),
    ],
)
def test_a_strangers_lock_is_checked_as_a_recipe_is(
    run: RunFiles, section: str, changes: Any, message: str
) -> None:
    resolved = json.loads(run.lock.read_text())["resolved"]
    given = changes if isinstance(changes, str) else resolved[section] | changes
    edit_lock(run, resolved=resolved | {section: given})
    with pytest.raises(RecipeError) as refused:
        again(run, check=True)
    assert any(message in problem.message for problem in refused.value.problems)


def test_a_strangers_lock_may_hold_anything(run: RunFiles) -> None:
    inputs = {"model": 3, "data": {"train": [1, {"key": [], "files": [None, {}]}], "eval": "x"}}
    edit_lock(run, inputs=inputs, packages=[], hardware={"gpus": 1}, git=4, environment="x")
    assert again(run, check=True)[0].drift.matters
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    edit_lock(run, resolved={"version": 1, "name": deep})
    with pytest.raises((UsageError, RecipeError)):
        again(run, check=True)
