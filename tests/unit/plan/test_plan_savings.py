"""Changes of a recipe against memory that ran out: valid, of effect, in the right order."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fsdpq.launch.plan import Hardware, Planned, prepare_plan
from fsdpq.plan.changes.savings import RunPhase, Saving, list_savings
from fsdpq.recipe.load import load_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))[::3]
PHASES: tuple[RunPhase, ...] = get_args(RunPhase)
BIG = ROOT / "recipes" / "llama-2-70b-qlora-4x40gb.yaml"
LARGE_ROWS = (
    "training.micro_batch_size=4", "training.gradient_accumulation_steps=2", "data.seq_len=2048",
)  # fmt: skip


def case_of(path: Path, *overrides: str) -> Planned:
    return prepare_plan(path, overrides, Hardware(gpus="8x80GiB"))


def savings_of(case: Planned, phase: RunPhase, asked: int = 0) -> dict[str, Saving]:
    found = list_savings(
        case.recipe, case.shape, phase, base_dir=case.loaded.base_dir, asked_bytes=asked
    )
    return {" ".join(saving.overrides): saving for saving in found}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_change_can_be_pasted(path: Path) -> None:
    """Onto the file that the user has, by the loader of the command line."""
    case = case_of(path)
    for overrides in {s.overrides for phase in PHASES for s in savings_of(case, phase).values()}:
        assert load_recipe(path, overrides).recipe != case.loaded.recipe, overrides


def test_what_helps_most_comes_first_and_other_runs_come_last() -> None:
    wide = ("fsdp.strategy=shard_grad_op", "fsdp.activation_checkpointing=none")
    found = list(savings_of(case_of(BIG, *LARGE_ROWS, *wide), "backward").values())
    plain = [saving.saved_bytes for saving in found if not saving.note]
    assert plain == sorted(plain, reverse=True)
    assert [bool(saving.note) for saving in found] == sorted(bool(s.note) for s in found)
    settings = {setting.partition("=")[0] for saving in found for setting in saving.overrides}
    assert settings >= {
        "training.micro_batch_size", "fsdp.activation_checkpointing", "fsdp.strategy",
        "fsdp.offload", "data.seq_len", "adapter.rank",
    }  # fmt: skip


def test_only_what_the_phase_holds_is_freed() -> None:
    case = case_of(BIG, *LARGE_ROWS, "fsdp.strategy=ddp")
    assert "fsdp.strategy=shard_grad_op" in savings_of(case, "load")
    for phase in ("load", "optimizer"):
        assert not any("micro_batch_size" in name for name in savings_of(case, phase))
    evaluation = savings_of(case, "evaluation")
    assert "training.micro_batch_size=2" in evaluation
    assert not any("activation" in name for name in evaluation)


def test_the_mildest_change_that_frees_enough_is_named() -> None:
    case = case_of(BIG, *LARGE_ROWS)
    first = savings_of(case, "backward")["training.micro_batch_size=2"]
    more = savings_of(case, "backward", asked=first.saved_bytes + 1)
    assert "training.micro_batch_size=2" not in more
    assert more["training.micro_batch_size=1"].saved_bytes > first.saved_bytes


def test_a_recipe_that_has_it_all_is_told_nothing_it_has() -> None:
    case = case_of(
        BIG, "training.micro_batch_size=1", "data.seq_len=256", "fsdp.offload=cpu",
        "fsdp.activation_offload=true", "adapter.rank=4", "launch.nproc_per_node=8",
    )  # fmt: skip
    assert savings_of(case, "backward") == {}


def test_chunks_follow_a_smaller_micro_batch() -> None:
    case = case_of(BIG, *LARGE_ROWS, "training.layer_chunks=4")
    assert "training.micro_batch_size=2 training.layer_chunks=2" in savings_of(case, "backward")
