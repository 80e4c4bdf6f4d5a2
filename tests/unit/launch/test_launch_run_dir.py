"""The run directory: its name, its content, and when it is refused."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.runs import run_dir as module
from fsdpq.launch.runs.lock_file import describe_checkout, describe_run
from fsdpq.launch.runs.run_dir import create_run_dir
from fsdpq.recipe.load import load_recipe, load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return resolve_launch(load_recipe(QUICKSTART).recipe, num_gpus=0, num_cpus=2, cpu_dtype="fp32")


def create(recipe: Recipe, run_dir: Path | None = None) -> RunFiles:
    return create_run_dir(recipe, raw=b"as: given\n", lock={"seed": 1}, run_dir=run_dir)


def test_new_runs_get_new_names(recipe: Recipe) -> None:
    names = [create(recipe).root for _ in range(3)]
    assert names[0].parent == Path("runs")
    stem = names[0].name
    assert stem.startswith("quickstart-")
    assert len(stem) == len("quickstart-") + 8
    assert [name.name for name in names] == [stem, f"{stem}-2", f"{stem}-3"]


def test_run_directory_holds_what_a_worker_needs(recipe: Recipe) -> None:
    files = create(recipe)
    assert files.recipe.read_bytes() == b"as: given\n"
    assert load_resolved(files.resolved) == recipe
    assert json.loads(files.lock.read_text()) == {"seed": 1}
    assert sorted(path.name for path in files.root.iterdir()) == [
        "logs", "recipe.resolved.yaml", "recipe.yaml", "run.lock.json",
    ]  # fmt: skip


def test_given_directory_may_be_new_or_empty(recipe: Recipe, tmp_path: Path) -> None:
    assert create(recipe, tmp_path / "a" / "b").root == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert create(recipe, tmp_path / "empty").resolved.exists()


def test_given_directory_with_content_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match=r"full` exists and is not empty"):
        create(recipe, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        create(recipe, tmp_path / "full" / "x")


def test_full_disk_is_named_before_anything_is_written(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**6))
    with pytest.raises(EnvironmentProblemError, match="has 1 MB left"):
        create(recipe)
    assert list(Path("runs").iterdir()) == []


def test_half_made_directory_is_removed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", fail)
    with pytest.raises(EnvironmentProblemError, match="No space left on device"):
        create(recipe)
    assert list(Path("runs").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_place_is_named(recipe: Recipe, tmp_path: Path) -> None:
    tmp_path.joinpath("ro").mkdir(mode=0o500)
    with pytest.raises(EnvironmentProblemError, match="cannot be written"):
        create(recipe, tmp_path / "ro" / "run")


def test_place_under_a_file_is_named(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblemError, match="cannot be written"):
        create(recipe, tmp_path / "file" / "run")


def test_lock_says_what_the_run_was_made_of(recipe: Recipe) -> None:
    loaded = load_recipe(QUICKSTART, ["adapter.rank=8"])
    inputs: dict[str, Any] = {"model": {"directory": "/m"}, "data": {"path": "/d"}}
    lock = describe_run(loaded, recipe, gpus=["GPU 0: X"], inputs=inputs)
    assert lock["inputs"] == inputs
    assert lock["overrides"] == ["adapter.rank=8"]
    assert (lock["world_size"], lock["seed"]) == (2, 1)
    assert lock["packages"]["pydantic"]
    assert lock["hardware"]["gpus"] == ["GPU 0: X"]
    assert lock["hardware"]["cpu"]
    assert int(lock["environment"]["OMP_NUM_THREADS"]) >= 1
    assert Recipe.model_validate_json(json.dumps(lock["resolved"]), strict=True) == recipe
    assert Path(lock["base_dir"]) == QUICKSTART.parent.absolute()
    json.dumps(lock)


def test_checkout_is_described(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    assert describe_checkout(tmp_path) is None
    git("init")
    (tmp_path / "a").touch()
    git("add", "a")
    git("commit", "-m", "a")
    found = describe_checkout(tmp_path)
    assert found is not None
    assert (len(found["commit"]), found["dirty"]) == (40, False)
    (tmp_path / "b").touch()
    untracked = describe_checkout(tmp_path)
    assert untracked == {"commit": found["commit"], "dirty": True, "diff_sha256": None}
    (tmp_path / "a").write_bytes(b"\xff\n")
    changed = describe_checkout(tmp_path)
    assert changed is not None
    assert len(changed["diff_sha256"]) == 64
    (tmp_path / "a").write_bytes(b"\xfe\n")
    assert describe_checkout(tmp_path) != changed
