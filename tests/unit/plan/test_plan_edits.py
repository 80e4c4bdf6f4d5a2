"""What makes a recipe fit: every suggestion loads, fits, and needs all its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import pytest

from fsdpq.errors import RecipeError
from fsdpq.launch.plan import Hardware, Planned, prepare_plan, resolve_for
from fsdpq.plan.build import CARD_SIZES, Wanted, build_plan
from fsdpq.plan.case import Case
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import GIB
from fsdpq.plan.result import Edit, Plan
from fsdpq.recipe.load import load_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*gb.yaml"))
SEVENTY = ROOT / "recipes" / "llama-2-70b-qlora-4x40gb.yaml"


def planned(path: Path, *overrides: str, gpus: str, ram: str | None = None) -> Planned:
    return prepare_plan(path, overrides, Hardware(gpus=gpus, ram=ram))


def plan_of(path: Path, *overrides: str, gpus: str, ram: str | None = None) -> Plan:
    return planned(path, *overrides, gpus=gpus, ram=ram).build(Wanted())


def plan_with(case: Planned, settings: tuple[str, ...]) -> Plan:
    """The plan of the recipe as the user would give it: through the loader of the command line."""
    loaded = load_recipe(case.loaded.path, (*case.loaded.overrides, *settings))
    recipe, _ = resolve_for(loaded.recipe, case.machine)
    return build_plan(recipe, case.shape, case.machine, wanted=Wanted(edits=False))


def too_small(path: Path, share: float) -> Planned:
    """The recipe on cards that hold a share of what it takes."""
    ranks = load_recipe(path).recipe.launch.nproc_per_node
    case = planned(path, gpus=f"{ranks}x288GiB", ram="96GiB")
    peak = Case(case.shape, case.machine).memory(case.recipe).peak_bytes
    gpus = parse_gpus(f"{ranks}x{share * peak / GIB:.2f}GiB")
    return replace(case, machine=replace(case.machine, gpus=gpus))


@dataclass(frozen=True)
class Short:
    """A recipe where it does not fit, its plan, and the plans with each of the edits."""

    case: Planned
    plan: Plan
    edited: tuple[tuple[Edit, Plan], ...]


@pytest.fixture(scope="module")
def short() -> list[Short]:
    found: list[Short] = []
    for path, share in zip(RECIPES, cycle((0.95, 0.55)), strict=False):
        case = too_small(path, share)
        plan = case.build(Wanted())
        edited = tuple((edit, plan_with(case, edit.settings)) for edit in plan.edits)
        found.append(Short(case, plan, edited))
    return found


def test_every_edit_loads_fits_and_takes_what_it_says(short: list[Short]) -> None:
    assert {each.plan.fits for each in short} == {False}
    without = [each.plan.name for each in short if not each.plan.edits]
    assert len(without) <= 2, f"nothing is suggested for {without}"
    for edit, again in (edited for each in short for edited in each.edited):
        assert again.fits is True, (again.name, edit)
        assert (again.device.peak.total, again.host.peak) == (edit.peak_bytes, edit.host_bytes)


def test_no_edit_has_a_part_that_it_does_not_need(short: list[Short]) -> None:
    for case, edit in ((each.case, edit) for each in short for edit in each.plan.edits):
        for name in ("fsdp.activation", "fsdp.strategy", "fsdp.offload", "data.", "adapter."):
            rest = tuple(setting for setting in edit.settings if not setting.startswith(name))
            if rest and len(rest) < len(edit.settings):
                assert plan_with(case, rest).fits is False, (case.loaded.path.stem, edit)


def test_edits_keep_the_rows_of_a_step_and_come_in_order(short: list[Short]) -> None:
    for each in short:
        kept = [edit.changes_result for edit in each.plan.edits]
        assert kept == sorted(kept), "what changes the result comes last"
        assert each.plan.workload is not None
        for edit, again in each.edited:
            assert again.workload is not None
            assert again.workload.global_rows == each.plan.workload.global_rows, edit


def test_edits_are_ordered_by_the_time_that_they_cost() -> None:
    plan = plan_of(
        SEVENTY, "training.micro_batch_size=8", "training.gradient_accumulation_steps=1",
        gpus="4xRTX3060", ram="128GiB",
    )  # fmt: skip
    times = [edit.slowdown for edit in plan.edits if not edit.changes_result]
    assert len(times) >= 2
    assert None not in times
    assert times == sorted(times, key=lambda time: time or 0)


def test_a_short_host_gives_the_base_to_the_disk() -> None:
    path = ROOT / "recipes" / "llama-2-70b-qlora-2x24gb.yaml"
    plan = plan_of(path, gpus="2x24GiB", ram="32GiB")
    assert [word for word in plan.shortages if "the host needs" in word]
    assert ("fsdp.offload=disk",) in [edit.settings for edit in plan.edits]


def test_more_ranks_than_gpus_are_fewer_in_every_edit() -> None:
    plan = plan_of(SEVENTY, gpus="2x24GiB", ram="128GiB")
    assert "asks for 4 ranks and there are 2 GPUs" in plan.shortages[0]
    assert plan.edits
    for edit in plan.edits:
        assert "launch.nproc_per_node=2" in edit.settings
    assert plan.workload is not None
    assert "training.gradient_accumulation_steps=8" in plan.edits[0].settings, "rows stay the same"


def test_a_plan_that_fits_suggests_nothing() -> None:
    plan = plan_of(SEVENTY, gpus="4x80GiB", ram="512GiB")
    assert (plan.fits, plan.edits, plan.shortages, plan.fits_on) == (True, (), (), ())


def test_other_hardware_is_the_smallest_that_will_do() -> None:
    path = ROOT / "recipes" / "llama-3-8b-qlora-1x24gb.yaml"
    case = planned(path, gpus="1x8GiB")
    plan = case.build(Wanted())
    card, several = plan.fits_on
    size = int(card.removeprefix("1 x ").removesuffix(" GiB"))
    smaller = max(each for each in CARD_SIZES if each < size)
    assert smaller * GIB < plan.device.peak.total <= size * GIB
    count = int(several.partition(" x ")[0])
    for ranks, fits in ((count, True), (count // 2, False)):
        wider = replace(case.machine, gpus=(case.machine.gpus or ())[:1] * ranks)
        loaded = load_recipe(path, (f"launch.nproc_per_node={ranks}",))
        recipe, _ = resolve_for(loaded.recipe, wider)
        assert build_plan(recipe, case.shape, wider).fits is fits


def test_full_finetuning_that_fits_nowhere_is_told_what_would() -> None:
    """16 bytes a weight of 69 billion over 8 ranks are 138 GB a rank."""
    path = ROOT / "recipes" / "llama-2-7b-full-2x80gb.yaml"
    plan = plan_of(
        path, "model.name_or_path=meta-llama/Llama-2-70b-hf", "fsdp.precision=auto",
        "launch.nproc_per_node=8", gpus="8xH100", ram="2048GiB",
    )  # fmt: skip
    assert plan.fits is False
    assert plan.device.peak.total > 138e9
    assert "fsdp.offload=cpu" in plan.edits[0].settings
    assert "8 x 141 GiB" in plan.fits_on or "8 x 180 GiB" in plan.fits_on


def test_bf16_on_a_card_that_lacks_it_is_said() -> None:
    path = ROOT / "recipes" / "llama-3-8b-qlora-1x24gb.yaml"
    assert any("lacks it" in note for note in plan_of(path, gpus="1xV100-32GB").notes)
    assert not any("lacks it" in note for note in plan_of(path, gpus="1xRTX3090").notes)


def test_many_changes_together_are_as_few_as_will_do() -> None:
    case = planned(
        SEVENTY, "fsdp.activation_checkpointing=none", "fsdp.strategy=shard_grad_op",
        "data.seq_len=2048", gpus="4x10GiB", ram="128GiB",
    )  # fmt: skip
    edits = case.build(Wanted()).edits
    assert edits
    for edit in edits:
        own = {"fsdp.offload_trained", "training.gradient_accumulation_steps"}  # follow from others
        needed = [setting for setting in edit.settings if setting.partition("=")[0] not in own]
        assert len(needed) >= 3
        for one in needed:
            rest = tuple(setting for setting in edit.settings if setting != one)
            try:
                assert plan_with(case, rest).fits is False, (edit, one)
            except RecipeError:
                continue  # the rest has no effect without it
