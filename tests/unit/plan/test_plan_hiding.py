"""What hides a transfer of weights: the closed form, and settings that reach it when applied."""

from __future__ import annotations

from typing import Any

import pytest
from support.measured_speeds import SEVEN, SEVENTY, card_shape, speed_recipe

from fsdpq.plan.build import build_plan
from fsdpq.plan.case import Case
from fsdpq.plan.changes.hiding import SMALL_SHARE, find_advice, tokens_to_hide
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import GIB, Machine
from fsdpq.plan.result import StepTime
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe

Sections = dict[str, dict[str, Any]]

SITUATIONS: dict[str, tuple[str, Machine, Sections]] = {
    "from the host to one GPU": (
        SEVENTY,
        Machine(gpus=parse_gpus("H200")),
        {"fsdp": {"offload": "cpu"}, "data": {"seq_len": 2048}},
    ),
    "from disk to two GPUs": (
        SEVENTY,
        Machine(gpus=parse_gpus("2xRTX4090"), ram_bytes=32 * GIB, disk_bandwidth=3e9),
        {
            "fsdp": {"offload": "disk", "offload_trained": False},
            "data": {"seq_len": 1024},
            "training": {"micro_batch_size": 2, "global_batch_size": 32},
            "launch": {"nproc_per_node": 2},
        },
    ),
    "over a network": (
        SEVEN,
        Machine(gpus=parse_gpus("2xRTX4090"), network_bandwidth=1.25e9),
        {
            "data": {"seq_len": 512},
            "training": {"micro_batch_size": 2, "layer_chunks": 2, "global_batch_size": 256},
            "launch": {"nproc_per_node": 2, "nnodes": 2},
        },
    ),
    "between GPUs without a link": (
        SEVENTY,
        Machine(gpus=parse_gpus("4xRTX4090")),
        {"data": {"seq_len": 512}, "launch": {"nproc_per_node": 4}},
    ),
}


def time_of(recipe: Recipe, model: str, machine: Machine) -> StepTime:
    case = Case(card_shape(model), machine)
    return case.time(recipe, case.memory(recipe))


def with_overrides(sections: Sections, overrides: tuple[str, ...]) -> Recipe:
    changed: Sections = {name: dict(section) for name, section in sections.items()}
    for override in overrides:
        key, _, value = override.partition("=")
        section, field = key.split(".")
        changed.setdefault(section, {})[field] = {"true": True, "false": False}.get(value) or int(
            value
        )
    return speed_recipe(changed)


@pytest.mark.parametrize("name", SITUATIONS)
def test_advice_applied_hides_the_transfer_and_is_faster(name: str) -> None:
    model, machine, sections = SITUATIONS[name]
    recipe = speed_recipe(sections)
    now = time_of(recipe, model, machine)
    case = Case(card_shape(model), machine)
    ((overrides, reason),) = find_advice(recipe, case, now, accumulation=None)

    changed = with_overrides(sections, overrides)
    then = time_of(changed, model, machine)
    assert (tokens_to_hide(now.transfers) or 0) > workload_of(recipe).tokens
    assert (tokens_to_hide(then.transfers) or 0) <= workload_of(changed).tokens
    gain = (then.tokens_per_s or 0) / (now.tokens_per_s or 1)
    assert gain > 1
    assert f"{gain:.2f} times" in reason
    assert workload_of(changed).chunk_rows == workload_of(recipe).chunk_rows
    # Less than computing it takes, where it runs beside it; little of it elsewhere.
    kernels = (then.compute_s or 0) * 1.01
    for each in then.transfers:
        assert (each.seconds or 0) <= kernels * (1 if each.hides else SMALL_SHARE)
    assert find_advice(changed, case, then, accumulation=None) == ()


def test_step_stays_as_large_where_its_rows_allow() -> None:
    model, machine, sections = SITUATIONS["over a network"]
    plan = build_plan(speed_recipe(sections), card_shape(model), machine)
    ((overrides, _),) = plan.time.advice
    assert not any("global_batch_size" in override for override in overrides)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_closed_form_is_where_transfer_and_computing_take_as_long(offload: str) -> None:
    machine = Machine(gpus=parse_gpus("RTX 4090"), disk_bandwidth=4e9)
    fsdp = {"offload": offload, "offload_trained": False}

    def planned(rows: int) -> StepTime:
        training = {"micro_batch_size": rows, "layer_chunks": rows}
        sections = {"fsdp": fsdp, "training": training, "data": {"seq_len": 64}}
        return time_of(speed_recipe(sections), SEVENTY, machine)

    tokens = planned(1).transfers[-1].hiding_tokens
    assert tokens is not None
    rows = -(-tokens // 64)
    for count, hides in ((rows - 1, False), (rows, True)):
        time = planned(count)
        # What the optimizer takes of `compute_s` is a few milliseconds.
        assert ((time.transfers[-1].seconds or 0) < (time.compute_s or 0)) == hides


def test_no_advice_where_it_is_of_no_use() -> None:
    fits, unknown = Machine(gpus=parse_gpus("H200")), Machine(gpus=parse_gpus("24GiB"))
    large = {"fsdp": {"offload": "cpu"}, "data": {"seq_len": 2048}}
    many = {"training": {"micro_batch_size": 16, "layer_chunks": 16}}
    eager = {"model": {"attn_implementation": "flex_attention"}}
    for sections, machine in (
        ({}, fits),  # nothing travels
        (large, unknown),
        (large | many, fits),  # it hides
        (large | eager, fits),  # rules refuse chunks
    ):
        recipe = speed_recipe(sections)
        case = Case(card_shape(SEVENTY), machine)
        time = case.time(recipe, case.memory(recipe))
        assert find_advice(recipe, case, time, accumulation=None) == ()
