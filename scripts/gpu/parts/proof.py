"""Rank 0 of several on one device, and what arithmetic and a trace say without any.

The process group is a ``fake`` one, whose collectives do nothing: shards, gathered buffers and
copies to and from the host are as large as in a real run. What is gathered is garbage, so losses
mean nothing, and a step's time is one without communication.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from fsdpq.metrics.peaks import GIB, cap_memory, release
from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.hardware.gpus import find_gpu
from fsdpq.plan.hardware.machine import Gpu, Machine
from fsdpq.plan.host import plan_host_memory
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.time import plan_time
from fsdpq.plan.weights import plan_weights
from fsdpq.recipe.root import Recipe
from fsdpq.worker.bench.shapes import Batch, Shape
from fsdpq.worker.random_base import EmptySource
from scripts.gpu.cases import CAP_GIB, CASES, FEW_CARDS, FIRST_RECIPE, Case
from scripts.gpu.parts import Bench
from scripts.gpu.training import build_recipe, build_trainer, measure


def few_cards(bench: Bench) -> None:
    """Measures 70B on 2 and 4 cards, and 405B on 8."""
    _measure_all(bench, FEW_CARDS)


def first_recipe(bench: Bench) -> None:
    """Measures what the first recipe's authors measured."""
    _measure_all(bench, FIRST_RECIPE)


def batch_of(bench: Bench, case: Case) -> Batch:
    """Returns the batch of a case, shorter rows where tiny is asked for."""
    return Batch(case.batch.rows, bench.tokens(case.batch.tokens))


def _measure_all(bench: Bench, cases: Sequence[Case]) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if bench.device.type == "cuda":
        torch.cuda.set_device(bench.device)
    for case in cases:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
        cap_memory(CAP_GIB, bench.device)
        bench.rows.attempt(case.name, _measure, bench, case)
        release(bench.device)
        dist.destroy_process_group()


def _measure(bench: Bench, case: Case) -> dict[str, Any]:
    device, batch = bench.device, batch_of(bench, case)
    trainer = build_trainer(
        bench.shape(case.shape), batch.tokens, device, lora_rank=case.lora_rank,
        sections=case.recipe_sections(batch), source=EmptySource(),
    )  # fmt: skip
    loaded = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    found = measure(trainer, batch, rounds=1)
    del found["losses"]
    return {"loaded_gib": loaded, "theirs_gib": case.theirs_gib} | found


def foretell(bench: Bench, cases: Sequence[Case] = CASES) -> None:
    """Writes what arithmetic says of every case, for a GPU whatever the device is."""
    for case in cases:
        bench.rows.attempt(case.name, plan_case, bench, case)


def traces(bench: Bench, cases: Sequence[Case] = CASES) -> None:
    """Traces every case under fake tensors, for a GPU whatever the device is; minutes each."""
    for case in cases:
        bench.rows.attempt(case.name, trace_case, bench, case)


def trace_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Returns the traced memory of a case: its peak, and by what it is used for."""
    from fsdpq.launch.plan_runs import trace_recipe

    recipe, model = _planned(bench, case)
    traced = trace_recipe(recipe, model)
    peak = traced.device.peak
    return {
        "trace_gib": peak.allocated / GIB, "trace_moment": peak.name, "trace_s": traced.seconds,
        "trace_parts": {part: round(size / GIB, 3) for part, size in peak.parts.items() if size},
    }  # fmt: skip


def _planned(bench: Bench, case: Case) -> tuple[Recipe, ModelShape]:
    """Returns the recipe of a case for GPUs, and the tensors of its model."""
    batch, shape = batch_of(bench, case), bench.shape(case.shape)
    recipe = build_recipe(
        shape, batch.tokens, "cuda", lora_rank=case.lora_rank, sections=case.recipe_sections(batch)
    )
    return recipe, model_shape(shape, batch.tokens)


def plan_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Returns the planned memory of a case: its peak, by what it is used for, and the host's."""
    recipe, model = _planned(bench, case)
    weights = plan_weights(recipe, model)
    peak = plan_device_memory(recipe, model, weights).peak
    host = plan_host_memory(recipe, model, weights)
    gpus = (gpu,) * case.ranks if (gpu := _gpu_of(bench.device)) else None
    time = plan_time(recipe, model, weights, Machine(gpus))
    return {
        "plan_tokens_per_s": time.tokens_per_s,
        "plan_gib": peak.allocated / GIB, "plan_device_gib": peak.total / GIB,
        "plan_reserved_gib": (peak.total - peak.parts.get("context", 0)) / GIB,
        "plan_host_gib": host.total / GIB, "plan_moment": peak.name,
        "plan_parts": {part: round(size / GIB, 3) for part, size in peak.parts.items() if size},
    }  # fmt: skip


def _gpu_of(device: torch.device) -> Gpu | None:
    """Returns what is known of the GPU at hand; None on a CPU."""
    return find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def model_shape(shape: Shape, tokens: int) -> ModelShape:
    """Returns the tensors of a Llama of ``shape``."""
    with tempfile.TemporaryDirectory() as directory:
        config = LlamaConfig(**shape.config(tokens), architectures=["LlamaForCausalLM"])
        config.save_pretrained(directory)
        return shape_from_directory(Path(directory))
