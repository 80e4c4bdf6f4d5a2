"""Recipes of older versions: made-up versions, as there is one real version so far."""

from pathlib import Path

import pytest

from fsdpq.errors import RecipeError
from fsdpq.recipe import migrate as module
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.migrate import Document, Migration, migrate

ROOT = Path(__file__).parents[3]
CURRENT = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")


def to_version_1(document: Document) -> None:
    document.rename_key("adapter", "r", to="rank")
    document.rename_key("tuning", to="training")
    document.set_value("fsdp", "strategy", to="full_shard")
    document.delete_key("launch", "telemetry", why="nothing is sent anywhere")


def to_version_0(document: Document) -> None:
    document.rename_key("lora", to="adapter")


OLD = (
    CURRENT.replace("version: 1 ", "version: 0 ")
    .replace("  rank: 16\n", "  r: 16\n")
    .replace("\ntraining:", "\ntuning:")
    .replace("strategy: full_shard ", "strategy: zero3 ")
    .replace("  device: auto", "  telemetry:\n    level: all\n  device: auto")
)


@pytest.fixture
def with_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (Migration(-1, to_version_0), Migration(0, to_version_1))
    monkeypatch.setattr(module, "MIGRATIONS", steps)


@pytest.mark.usefixtures("with_old_versions")
def test_migrated_recipe_is_the_new_one_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD, encoding="utf-8")
    migrated = migrate(path)
    assert migrated.text == CURRENT
    assert migrated.changes == (
        "`adapter.r` is now `adapter.rank`",
        "`tuning` is now `training`",
        "`fsdp.strategy: zero3` is now `full_shard`",
        "`launch.telemetry` is gone: nothing is sent anywhere",
        "`version: 0` is now `1`",
    )
    assert path.read_text(encoding="utf-8") == OLD


@pytest.mark.usefixtures("with_old_versions")
def test_migrations_run_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "older.yaml"
    text = OLD.replace("version: 0 ", "version: -1 ").replace("\nadapter:", "\nlora:")
    path.write_text(text, encoding="utf-8")
    assert migrate(path).text == CURRENT


@pytest.mark.usefixtures("with_old_versions")
def test_old_recipe_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    [problem] = caught.value.problems  # the keys of the old version are no mistakes yet
    assert problem.hint == f"`fsdpq migrate {path} --write` rewrites it"
    assert problem.location is not None
    assert (problem.location.line, problem.location.column) == (11, 10)


def test_edits_of_missing_keys_do_nothing() -> None:
    document = Document("a:\n  b: 1\n")
    document.rename_key("a", "c", to="d")
    document.set_value("a", to="d")
    document.delete_key("c", why="")
    assert (document.text, document.changes) == ("a:\n  b: 1\n", [])


def test_last_key_is_deleted_whole() -> None:
    document = Document("a: 1\nb:\n  - x\n  - y\n")
    document.delete_key("b", why="gone")
    assert document.text == "a: 1\n"
