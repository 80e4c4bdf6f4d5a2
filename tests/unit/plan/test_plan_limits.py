"""How far a recipe can go, what else could hold it, and that a plan never decreases."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from fsdpq.launch.plan import Hardware, Planned, prepare_plan, resolve_for
from fsdpq.plan.as_json import plan_json
from fsdpq.plan.build import Wanted, build_plan
from fsdpq.plan.case import Case
from fsdpq.plan.changes.moves import LENGTH_STEP, batch_settings
from fsdpq.plan.changes.settings import Settings, apply_settings
from fsdpq.plan.result import Plan
from fsdpq.recipe.load import load_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SEVENTY = ROOT / "recipes" / "llama-2-70b-qlora-2x24gb.yaml"


@pytest.fixture(scope="module")
def case() -> Planned:
    return prepare_plan(SEVENTY, (), Hardware(gpus="2xRTX4090", ram="64GiB"))


@pytest.fixture(scope="module")
def plan(case: Planned) -> Plan:
    return case.build(Wanted(limits=True, variants=True))


def fits_with(case: Planned, *settings: str) -> bool | None:
    loaded = load_recipe(SEVENTY, settings)
    recipe, _ = resolve_for(loaded.recipe, case.machine)
    return build_plan(recipe, case.shape, case.machine, wanted=Wanted(edits=False)).fits


def test_a_limit_fits_and_one_step_more_does_not(case: Planned, plan: Plan) -> None:
    assert [limit.setting for limit in plan.limits] == [
        "data.seq_len", "training.micro_batch_size", "adapter.rank",
    ]  # fmt: skip
    for limit in plan.limits:
        assert limit.value is not None
        assert limit.value >= limit.now
        assert f"{limit.setting}={limit.value}" in limit.settings
        assert fits_with(case, *limit.settings)
        if limit.bound == "memory":
            step = LENGTH_STEP if limit.setting == "data.seq_len" else 1
            more = [
                setting.replace(f"={limit.value}", f"={limit.value + step}")
                for setting in limit.settings
                if setting.startswith(limit.setting)
            ]
            rows = [s for s in limit.settings if not s.startswith(limit.setting)]
            assert fits_with(case, *more, *rows) is False, limit


def test_the_length_ends_where_the_model_does(plan: Plan) -> None:
    length = plan.limits[0]
    assert (length.value, length.bound) == (4096, "the model was made for 4,096 tokens")


def test_variants_hold_the_recipe_once_and_allow_what_the_loader_allows(
    case: Planned, plan: Plan
) -> None:
    assert [each for each in plan.variants if not each.settings] == [
        each
        for each in plan.variants
        if (each.strategy, each.offload, each.activation_checkpointing)
        == ("full_shard", "cpu", "full")
    ]
    assert len(plan.variants) == 18
    for each in plan.variants:
        assert fits_with(case, *each.settings) is each.fits, each


def test_variants_leave_out_what_would_have_no_effect(case: Planned) -> None:
    own = ("fsdp.offload_trained=false", "fsdp.activation_offload=true")
    changed = prepare_plan(SEVENTY, own, Hardware(gpus="2xRTX4090", ram="64GiB"))
    variants = changed.build(Wanted(variants=True)).variants
    assert len(variants) == 18
    for each in variants:
        assert fits_with(case, *own, *each.settings) is each.fits, each


def test_a_plan_is_json(plan: Plan) -> None:
    told = json.loads(json.dumps(plan_json(plan)))
    assert told["format"] == 1
    assert told["device"]["peak_bytes"] == plan.device.peak.total
    assert (
        sum(told["device"]["moments"][-1]["parts"].values())
        == (told["device"]["moments"][-1]["bytes"])
    )
    assert told["machine"]["gpus"][0]["name"] == "RTX 4090"
    assert told["host"]["peak_bytes"] == plan.host.peak
    assert len(told["limits"]) == 3
    assert told["workload"]["seq_len"] == 2048


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_plan_never_decreases_with_length_batch_or_rank(path: Path) -> None:
    case = prepare_plan(path, (), Hardware(gpus="8x80GiB", ram="512GiB"))
    asked = Case(case.shape, case.machine)
    recipe = apply_settings(case.recipe, (("training.layer_chunks", 1),))
    growing: list[list[Settings]] = [
        [(("data.seq_len", length),) for length in (64, 512, 1000, 2048, 8192)],
        [batch_settings(recipe, rows) for rows in (1, 2, 3, 4, 8, 64)],
    ]
    if recipe.adapter.kind in ("lora", "dora"):
        growing.append([(("adapter.rank", rank),) for rank in (1, 4, 16, 100, 512)])
    for settings in growing:
        found = [asked.memory(apply_settings(recipe, each)) for each in settings]
        for less, more in pairwise(found):
            assert less.peak_bytes <= more.peak_bytes
            assert less.host_bytes <= more.host_bytes
