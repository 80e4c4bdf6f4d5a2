"""Every value of a run says where it was written; the others are defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.provenance import describe_sources

RECIPE = """\
defaults: [./base.yaml]
version: 1
name: mine
model: {name_or_path: ./model}
quantization: {kind: none}
data: {path: rows.jsonl, format: text}
adapter:
  kind: lora
  rank: 4
training: {steps: 3, global_batch_size: 2}
"""


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedRecipe:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    Path("base.yaml").write_text("adapter:\n  kind: lora\n  alpha: 8\n")
    Path("mine.yaml").write_text(RECIPE)
    return load_recipe(Path("mine.yaml"), ["training.steps=5", "launch.device=cpu"])


def test_a_value_is_of_the_file_a_fragment_the_command_line_or_the_machine(loaded: LoadedRecipe):
    sources = describe_sources(loaded, resolve_launch(loaded.recipe, num_gpus=0))
    assert sources["adapter.rank"] == "mine.yaml:9:9"
    assert sources["adapter.alpha"] == "base.yaml:3:10 (base fragment)"
    assert sources["training.steps"] == "command line: training.steps=5"
    assert sources["launch.device"] == "command line: launch.device=cpu"
    assert sources["launch.nproc_per_node"] == "auto", "nobody wrote `auto`, a default"
    assert "training.seed" not in sources, "a default"


def test_a_recipe_of_a_lock_keeps_what_that_says_but_for_what_is_typed_now(loaded: LoadedRecipe):
    recorded = {"adapter.rank": "theirs.yaml:1:1", "launch.nproc_per_node": "auto"}
    recorded |= {"training.steps": "theirs.yaml:2:1"}
    again = replace(loaded, recorded_sources=recorded)
    sources = describe_sources(again, resolve_launch(loaded.recipe, num_gpus=0))
    assert sources["adapter.rank"] == "theirs.yaml:1:1"
    assert sources["training.steps"] == "command line: training.steps=5"
    assert sources["launch.nproc_per_node"] == "auto"
    assert "adapter.alpha" not in sources, "the lock has no place for it: it was a default there"


def test_what_a_smoke_run_makes_smaller_is_said_so(loaded: LoadedRecipe):
    changed = loaded.recipe.model_copy(
        update={"training": loaded.recipe.training.model_copy(update={"steps": 2})}
    )
    assert describe_sources(loaded, changed, smoke=True)["training.steps"] == "smoke run"
