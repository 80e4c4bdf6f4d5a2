"""Which changed settings make another run, over every key that a recipe can have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_recipe

from fsdpq.errors import CheckpointError
from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.recipe.continuation import CLASSES, Class, class_of, list_changes, read_saved_recipe
from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.difference import diff_lines
from fsdpq.recipe.load import dump_recipe, load_recipe, load_resolved
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.source import read_source
from fsdpq.recipe.view import View

LIBRARY = sorted((Path(__file__).parents[3] / "recipes").rglob("*.yaml"))
LIBRARY = [path for path in LIBRARY if path.parent.name != "base"]  # fragments are no recipes


def every_key() -> Iterator[str]:
    sections = list_sections()
    yield from (name for name in Recipe.model_fields if name not in sections)
    for name, section in sections.items():
        names = {field for options in section.kinds.values() for field in options.model_fields}
        yield from (f"{name}.{field}" for field in sorted(names))


def view(recipe: Recipe) -> View:
    return View(Path("r.yaml"), Path("r.yaml"), recipe, Marks({}, {}))


def changes(new: Recipe, *, same_rows: bool = True, same_base: bool = True) -> list[str]:
    old = tiny_recipe()
    found = list_changes(view(old), view(new), same_rows=same_rows, same_base=same_base)
    return [difference.key for difference in found]


def test_every_key_has_a_class() -> None:
    for key in every_key():
        assert class_of(key) in Class, key


def test_every_class_is_of_a_key_and_a_new_section_needs_one() -> None:
    known = set(every_key())
    whole = {key.removesuffix(".*") for key in CLASSES if key.endswith(".*")}
    assert {key for key in CLASSES if not key.endswith(".*")} <= known
    assert whole <= set(list_sections())
    with pytest.raises(KeyError):
        class_of("model.new_key")
    with pytest.raises(KeyError):
        class_of("training.new_key")
    with pytest.raises(KeyError):
        class_of("fsdp.new_key")


def test_where_and_how_fast_it_runs_does_not_matter() -> None:
    new = tiny_recipe(
        launch={"nproc_per_node": 4, "max_restarts": 3},
        training={"micro_batch_size": 1, "layer_chunks": 1, "eval_interval": 3},
        fsdp={"strategy": "ddp", "activation_checkpointing": "none"},
        checkpoint={"interval": 5, "keep_last": 7},
        metrics={"log_interval": 2},
        model={"attn_implementation": "eager"},
    )
    assert changes(new) == []


@pytest.mark.parametrize(
    ("section", "change", "keys"),
    [
        ("training", {"steps": 6}, ["training.steps"]),
        ("training", {"seed": 8}, ["training.seed"]),
        ("training", {"global_batch_size": 16}, ["training.global_batch_size"]),
        ("optimizer", {"lr": 2e-3}, ["optimizer.lr"]),
        ("adapter", {"rank": 8}, ["adapter.rank"]),
        ("model", {"dtype": "bf16"}, ["model.dtype"]),
        ("fsdp", {"precision": {"param": "bf16"}}, ["fsdp.precision"]),
        ("quantization", {"kind": "bnb", "quant_type": "fp4"}, ["quantization.quant_type"]),
        ("data", {"shuffle": False}, ["data.shuffle"]),
    ],
)
def test_what_is_computed_matters(section: str, change: dict[str, Any], keys: list[str]) -> None:
    found = changes(tiny_recipe(**{section: change}))
    assert keys == found[: len(keys)] or found[0].startswith(f"{keys[0]}.")


def test_rows_and_base_are_judged_by_what_they_are() -> None:
    moved = tiny_recipe(data={"path": "elsewhere.jsonl"}, model={"name_or_path": "moved"})
    assert changes(moved) == []
    assert changes(moved, same_rows=False) == ["data.path"]
    assert changes(moved, same_base=False) == ["model.name_or_path"]


def test_another_kind_is_shown_with_both_values_and_places(tmp_path: Path) -> None:
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(dump_recipe(tiny_recipe(lr_scheduler={"kind": "linear", "warmup_steps": 2})))
    new = View(path, path, load_resolved(path), read_source(path).marks)
    found = list(list_changes(view(tiny_recipe()), new, same_rows=True, same_base=True))
    lines = list(diff_lines(found))
    assert lines[1:4] == [
        "lr_scheduler.kind",
        "  -  constant  default",
        f"  +  linear    {path}:{_line_of(path, 'kind: linear')}:9",
    ]
    assert "  -  (has no such key)" in lines


def _line_of(path: Path, text: str) -> int:
    return 1 + next(n for n, line in enumerate(path.read_text().splitlines()) if text in line)


def test_saved_recipe_of_another_version_is_refused() -> None:
    saved = tiny_recipe().model_dump(mode="json")
    assert read_saved_recipe(saved, "a checkpoint") == tiny_recipe()
    saved["optimizer"]["momentum"] = 1
    with pytest.raises(CheckpointError, match=r"a checkpoint cannot be read: `optimizer\.adamw\."):
        read_saved_recipe(saved, "a checkpoint")


@pytest.mark.parametrize("path", LIBRARY, ids=[path.stem for path in LIBRARY])
def test_resolved_recipes_of_the_library_can_be_loaded_again(path: Path, tmp_path: Path) -> None:
    for num_gpus, cpu_dtype in itertools.product((0, 8), ("fp32", "bf16")):
        loaded = load_recipe(path).recipe
        if loaded.launch.device == "cuda" and num_gpus == 0:
            continue
        resolved = resolve_launch(loaded, num_gpus=num_gpus, num_cpus=2, cpu_dtype=cpu_dtype)
        again = tmp_path / "again.yaml"
        again.write_text(dump_recipe(resolved))
        assert load_recipe(again).recipe == resolved
