"""Changes of a recipe against memory that ran out: valid, of effect, in the right order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.tiny import tiny_recipe

from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.worker.keeping.memory_edits import (
    Edit,
    Sizes,
    activation_bytes,
    apply_overrides,
    list_edits,
)

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))[::3]
PHASES = ("load", "forward", "backward", "optimizer", "evaluation")
GB = 10**9
SIZES = Sizes(32, 4096, 2, 2, 2 * GB, 4 * GB, GB // 10, GB // 10, GB // 5)


def resolved(path: Path) -> Recipe:
    recipe = load_recipe(path).recipe
    ranks = recipe.launch.nproc_per_node
    num_gpus = ranks if isinstance(ranks, int) else 1
    return resolve_launch(recipe, num_gpus=num_gpus, cpu_dtype="fp32")


def edits_of(recipe: Recipe, phase: str = "backward", sizes: Sizes = SIZES) -> dict[str, Edit]:
    found = list_edits(recipe, sizes, phase, base_dir=Path())  # type: ignore[arg-type]
    return {" ".join(edit.overrides): edit for edit in found}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_change_can_be_pasted(path: Path) -> None:
    """Onto the file that the user has, by the loader of the command line."""
    given, recipe = load_recipe(path).recipe, resolved(path)
    found = {
        edit.overrides
        for phase in PHASES
        for edit in list_edits(recipe, SIZES, phase, base_dir=path.parent)
    }
    for overrides in found:
        assert load_recipe(path, overrides).recipe != given, f"{overrides} changes nothing"


def test_what_helps_most_comes_first_and_other_runs_come_last() -> None:
    recipe = tiny_recipe(
        training={"micro_batch_size": 4, "global_batch_size": 8},
        data={"seq_len": 2048},
        fsdp={"strategy": "shard_grad_op", "activation_checkpointing": "none"},
    )
    found = list_edits(recipe, SIZES, "backward", base_dir=Path())
    plain = [edit.saved_bytes for edit in found if not edit.note]
    assert plain == sorted(plain, reverse=True)
    assert [bool(edit.note) for edit in found] == sorted(bool(edit.note) for edit in found)
    # All layers' products, 28.5 elements of 2 bytes for 8192 tokens of 4096, become one layer's.
    assert found[0].overrides == ("fsdp.activation_checkpointing=full",)
    one_layer = 28.5 * 2 * 8192 * 4096
    inputs = 32 * 2 * 8192 * 4096
    assert found[0].saved_bytes == pytest.approx(32 * one_layer - inputs)
    names = {" ".join(edit.overrides) for edit in found}
    assert {
        "training.micro_batch_size=2",
        "fsdp.strategy=full_shard",
        "fsdp.offload=cpu",
        "optimizer.kind=adamw_8bit",
        "data.seq_len=1024",
    } <= names


def test_only_what_the_phase_holds_is_freed() -> None:
    recipe = tiny_recipe(training={"micro_batch_size": 4}, fsdp={"strategy": "ddp"})
    whole = dataclasses.replace(SIZES, frozen_bytes=SIZES.frozen_whole_bytes)
    assert set(edits_of(recipe, "load", whole)) == {"fsdp.strategy=full_shard", "fsdp.offload=cpu"}
    assert "training.micro_batch_size=2" not in edits_of(recipe, "optimizer")
    assert "optimizer.kind=adamw_8bit" in edits_of(recipe, "optimizer")
    evaluation = edits_of(recipe, "evaluation")
    assert "training.micro_batch_size=2" in evaluation
    assert not any("activation" in name for name in evaluation)


def test_a_recipe_that_has_it_all_is_told_nothing_it_has() -> None:
    recipe = tiny_recipe(
        training={"micro_batch_size": 1, "global_batch_size": 8},
        fsdp={"offload": "cpu", "activation_offload": True},
        optimizer={"kind": "adamw_8bit", "lr": 1e-3},
        data={"seq_len": 128},
    )
    assert edits_of(recipe) == {}


def test_chunks_follow_a_smaller_micro_batch() -> None:
    recipe = tiny_recipe(
        training={"micro_batch_size": 4, "global_batch_size": 8, "layer_chunks": 4}
    )
    edit = edits_of(recipe)["training.micro_batch_size=2 training.layer_chunks=2"]
    changed = apply_overrides(recipe, edit.overrides)
    assert changed is not None
    # The inputs of the layers are those of half the rows; the layer computed again stays one row.
    now, then = activation_bytes(recipe, SIZES), activation_bytes(changed, SIZES)
    assert edit.saved_bytes > 0
    assert then < now
