"""Verbs that answer questions about recipes and runs."""

import json
from pathlib import Path

import pytest
import yaml

from fsdpq.cli.library import named_recipes
from fsdpq.cli.main import main
from fsdpq.recipe.root import recipe_schema
from fsdpq.registry import ROWS

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    from fsdpq.launch.machine.resolve import resolve_launch
    from fsdpq.launch.runs.run_dir import create_run_dir
    from fsdpq.recipe.load import load_recipe

    recipe = resolve_launch(load_recipe(Path(QUICKSTART)).recipe, num_gpus=0, cpu_dtype="fp32")
    return create_run_dir(recipe, raw=b"", lock={}, run_dir=tmp_path / "run").root


def test_run_differs_from_its_recipe_in_what_was_resolved(
    capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    found = json.loads(run(capsys, "diff", QUICKSTART, str(run_dir), "--json"))["keys"]
    keys = {entry["key"]: entry for entry in found}
    assert {"launch.nproc_per_node", "launch.device"} <= set(keys)
    assert keys["launch.nproc_per_node"]["old"]["value"] == "auto"
    assert keys["launch.nproc_per_node"]["new"]["value"] == 2
    assert "recipe.resolved.yaml:" in keys["launch.nproc_per_node"]["new"]["source"]
    assert "adapter.rank" not in keys


def test_show_reads_a_run(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    shown = yaml.safe_load(run(capsys, "show", str(run_dir)))
    assert shown["launch"]["nproc_per_node"] == 2
    assert json.loads(run(capsys, "show", str(run_dir), "--json")) == shown


def test_settled_recipe_takes_no_overrides(
    capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["show", str(run_dir), "adapter.rank=8"])
    assert end.value.code == 2
    assert "is settled" in capsys.readouterr().err


def test_every_shipped_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(run(capsys, "recipes", "ls", "--json"))
    assert [entry["name"] for entry in entries] == list(named_recipes())
    [quickstart] = [entry for entry in entries if entry["name"] == "quickstart"]
    assert quickstart["summary"].startswith("QLoRA of a small chat model")
    assert quickstart["hardware"].startswith("any Linux machine")
    assert (quickstart["model"], quickstart["method"]) == (
        "pypi:smollm2-135m-instruct", "lora over nf4",
    )  # fmt: skip
    table = run(capsys, "recipes", "ls").splitlines()
    assert len(table) == len(entries) + 3


@pytest.mark.parametrize("name", sorted(named_recipes()))
def test_copied_recipe_has_its_schema_beside_it(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipes", "cp", name) == f"{name}.yaml\n"
    text = Path(f"{name}.yaml").read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert json.loads(Path("recipe.schema.json").read_text()) == recipe_schema()
    assert f"recipes/{name}.yaml" not in text
    shipped = named_recipes()[name].read_text(encoding="utf-8").splitlines()
    assert len(text.splitlines()) == len(shipped)


def test_second_copy_keeps_the_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["recipes", "cp", "quickstart"])
    assert "is there already" in capsys.readouterr().err
    assert Path("quickstart.yaml").read_text() == "mine"
    assert run(capsys, "recipes", "cp", "quickstart", "other.yaml") == "other.yaml\n"


def test_kinds_as_json_hold_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "kinds", "--json"))
    kinds = {(entry["section"], entry["kind"]): entry for entry in found}
    for row in ROWS:
        entry = kinds[row.section, row.kind]
        assert [package["name"] for package in entry["packages"]] == list(row.requires)
        assert [key["key"] for key in entry["keys"]] == [
            f"{row.section}.{name}" for name in row.options.model_fields
        ]


def test_migrate_writes_the_file_only_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsdpq.recipe import migrate as module

    step = module.Migration(0, lambda document: document.rename_key("title", to="name"))
    monkeypatch.setattr(module, "MIGRATIONS", (step,))
    path, old, new = tmp_path / "old.yaml", "version: 0\ntitle: x\n", "version: 1\nname: x\n"
    path.write_text(old)
    main(["migrate", str(path)])
    assert capsys.readouterr() == (new, "`title` is now `name`\n`version: 0` is now `1`\n")
    assert path.read_text() == old
    main(["migrate", str(path), "--write"])
    assert path.read_text() == new


def test_usage_errors_are_json_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["validate", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 2
    assert found["problems"][0]["message"] == "Missing argument 'RECIPE'"
