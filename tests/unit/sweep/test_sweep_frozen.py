"""Frozen trials are complete recipes that stay what they are; a sweep only adds to them."""

import json
from pathlib import Path

import pytest

from fsdpq.errors import CheckpointError, UsageError
from fsdpq.recipe.load import load_recipe
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.spec import recipe_spec
from fsdpq.sweep.frozen import freeze, read_frozen
from fsdpq.sweep.trial import Trial

RECIPE = """\
version: 1
name: tiny
description: ${model.name_or_path} costs \\${5}
model: {name_or_path: org/model}
data: {path: rows.jsonl, format: text}
adapter: {kind: lora, rank: 8}
"""


@pytest.fixture
def files(tmp_path: Path) -> SweepFiles:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return SweepFiles(tmp_path / "sweeps" / "one")


def trials(files: SweepFiles, *words: str) -> list[Trial]:
    return list(expand(recipe_spec(files.root.parents[1] / "r.yaml", words)).trials)


def test_a_frozen_trial_is_read_back(files: SweepFiles) -> None:
    made = trials(files, "adapter.rank=8,16", "quantization=bnb,none")
    assert freeze(files, made) == read_frozen(files) == made
    assert [trial.base_dir for trial in read_frozen(files)] == [files.root.parents[1]] * 4


def test_a_frozen_recipe_is_complete_and_valid_where_its_paths_start(files: SweepFiles) -> None:
    [trial] = freeze(files, trials(files, "adapter.rank=16"))
    path = files.recipe(trial.id)
    copy = trial.base_dir / "copy.yaml"
    copy.write_bytes(path.read_bytes())
    loaded = load_recipe(copy)
    assert loaded.recipe == trial.recipe
    assert loaded.recipe.description == "org/model costs ${5}"
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# trial {trial.id} of ")
    assert "lora_plus_ratio" in text  # a default


def test_freezing_again_adds_and_never_removes(files: SweepFiles) -> None:
    first = freeze(files, trials(files, "adapter.rank=8,16"))
    before = {path: path.read_bytes() for path in files.recipe("x").parent.iterdir()}
    second = freeze(files, trials(files, "adapter.rank=4,16"))
    assert [trial.settings["adapter.rank"] for trial in second] == [8, 16, 4]
    assert second[:2] == first
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_changed_recipe_is_refused_and_a_deleted_one_comes_back(files: SweepFiles) -> None:
    made = freeze(files, trials(files, "adapter.rank=8,16"))
    path = files.recipe(made[0].id)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"rank: 8", b"rank: 9"))
    with pytest.raises(UsageError, match="is no longer the recipe of this trial"):
        freeze(files, made)
    path.unlink()
    freeze(files, made)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 2, "trials": []}', '{"version": 1, "trials": [{}]}']
)
def test_a_damaged_list_is_refused_and_kept(files: SweepFiles, text: str) -> None:
    files.root.mkdir(parents=True)
    files.trials.write_text(text, encoding="utf-8")
    for act in (lambda: read_frozen(files), lambda: freeze(files, [])):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert "--out" in caught.value.hint
    assert files.trials.read_text(encoding="utf-8") == text


def test_nothing_frozen_is_no_trials(files: SweepFiles) -> None:
    assert read_frozen(files) == []


def test_ids_of_the_list_are_those_of_its_recipes(files: SweepFiles) -> None:
    made = freeze(files, trials(files, "adapter.rank=8,16"))
    content = json.loads(files.trials.read_text(encoding="utf-8"))
    assert [entry["id"] for entry in content["trials"]] == [trial.id for trial in made]
