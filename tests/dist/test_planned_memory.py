"""What a real step allocates, phase by phase, is what `fsdpq.plan.device` says.

Allocations are those of torch's allocator on the host (`fsdpq.worker.bench.allocations`), every one
of them, beyond what is held before the step: shards and the optimizer's states.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankPool
from support.sharded import CPU, do_step
from support.tiny import random_rows, save_tiny_llama, tiny_recipe

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.result import RankMemory
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.plan.weights import plan_weights
from fsdpq.recipe.root import Recipe
from fsdpq.training.step import StepMode
from fsdpq.worker.assemble import assemble_model
from fsdpq.worker.bench.allocations import Allocations

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 1024,
}
"""Every width is another one, so that no two terms of the arithmetic can stand for each other."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "tied": {},
    "gemma2": {"family": "gemma2"},
    "fused": {"family": "phi3", "head_dim": 64},
    "mixture": {
        "family": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 160,
    },
}  # fmt: skip

TOLERANCE = 0.05
HANDFUL = 4
"""Cases that are measured in one go."""

HELD_BEFORE = ("codes", "scales", "plain", "trained", "optimizer")
LORA = {"kind": "lora", "rank": 16, "alpha": 32.0}
DORA = {**LORA, "kind": "dora"}
BF16 = {"dtype": "bf16"}


class Case(NamedTuple):
    """A run: its ranks, the rows of a micro-batch and their length, and what its recipe says."""

    num_ranks: int
    rows: int
    length: int
    sections: dict[str, Any]
    micro_batches: int = 1
    model: str = "llama"

    @property
    def recipe(self) -> Recipe:
        global_rows = self.rows * self.num_ranks * self.micro_batches
        batch = {"micro_batch_size": self.rows, "global_batch_size": global_rows}
        launch = {"device": "cpu", "nproc_per_node": self.num_ranks}
        data = {"path": "rows.jsonl", "seq_len": self.length}
        sections = {"adapter": LORA, "data": data, "launch": launch, **self.sections}
        return tiny_recipe(**{**sections, "training": {**batch, **sections.get("training", {})}})


def settings(**fsdp: Any) -> dict[str, Any]:
    return {"fsdp": fsdp}


CASES = {
    "bf16": Case(1, 1, 1024, {"model": BF16}),
    "fp32, short": Case(1, 2, 192, {}),
    "hqq of 3 bits": Case(1, 1, 96, {"quantization": {"kind": "hqq", "nbits": 3}}),
    "hqq, axis 0": Case(
        1,
        1,
        96,
        {"model": BF16, "quantization": {"kind": "hqq", "nbits": 8, "axis": 0, "group_size": 32}},
    ),
    "all kept": Case(1, 1, 512, {"model": BF16, **settings(activation_checkpointing="none")}),
    "every second kept": Case(1, 2, 256, settings(activation_checkpointing="selective")),
    "layer chunks": Case(1, 8, 128, {"model": BF16, "training": {"layer_chunks": 8}}),
    "accumulation": Case(1, 1, 512, {"model": BF16}, micro_batches=2),
    "eager": Case(1, 1, 512, {"model": {**BF16, "attn_implementation": "eager"}}),
    "dora": Case(1, 1, 512, {"model": BF16, "adapter": DORA}),
    "dropout": Case(1, 1, 512, {"model": BF16, "adapter": {**LORA, "dropout": 0.1}}),
    "dora, dropout": Case(1, 1, 512, {"adapter": {**DORA, "dropout": 0.1}}),
    "trained head": Case(1, 1, 512, {"adapter": {**LORA, "modules_to_save": ["lm_head"]}}),
    "llama_pro": Case(
        1, 1, 512, {"model": BF16, "adapter": {"kind": "llama_pro", "num_new_layers": 2}}
    ),
    "full finetuning": Case(
        1, 1, 512, {"model": BF16, "adapter": {"kind": "none"}, "quantization": {"kind": "none"}}
    ),
    "autocast": Case(1, 1, 512, settings(precision="bf16_autocast")),
    "tied, full finetuning": Case(
        1, 1, 512, {"adapter": {"kind": "none"}, "quantization": {"kind": "none"}}, model="tied"
    ),
    "gemma2": Case(1, 1, 256, {"model": {"attn_implementation": "eager"}}, model="gemma2"),
    "fused projections": Case(1, 1, 512, {"model": BF16}, model="fused"),
    "mixture": Case(1, 1, 512, {"model": BF16}, model="mixture"),
    "full_shard": Case(2, 1, 1024, {"model": BF16}),
    "shard_grad_op": Case(2, 1, 1024, {"model": BF16, **settings(strategy="shard_grad_op")}),
    "ddp": Case(2, 1, 1024, {"model": BF16, **settings(strategy="ddp")}),
    "no_sync": Case(2, 1, 1024, {"model": BF16, **settings(no_sync=True)}, micro_batches=2),
    "offload on two ranks": Case(2, 1, 1024, {"model": BF16, **settings(offload="cpu")}),
}


def one_step(case: Case, length: int) -> Step:
    """Returns a step of rows that are all of one length."""
    ranks, rows = case.num_ranks, case.rows
    found = random_rows(rows * ranks * case.micro_batches, shortest=length, longest=length)
    every = [Row(row.input_ids, [False] + [True] * (length - 1)) for row in found]
    return build_step(every, micro_batch_size=rows, rank=dist.get_rank(), world_size=ranks)


def measure(models: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Returns the most that is allocated in each phase of each case's second step."""
    return {name: measure_case(models / CASES[name].model, CASES[name]) for name in names}


def measure_case(directory: Path, case: Case) -> dict[str, int]:
    recipe = case.recipe
    assembled = assemble_model(recipe, directory, device=CPU, report_load=lambda _done, _all: None)
    optimizer = torch.optim.AdamW(assembled.trainable, lr=1e-3, fused=True)

    do_step(assembled, optimizer, one_step(case, 16))  # makes the optimizer's states
    step = one_step(case, case.length)
    gc.collect()
    with Allocations() as allocations:
        mode = StepMode(no_sync=recipe.fsdp.no_sync, on_phase=allocations.end_phase)
        do_step(assembled, optimizer, step, mode)
    return allocations.phase_peaks()


def plan(directory: Path, case: Case) -> RankMemory:
    shape = shape_from_directory(directory)
    return plan_device_memory(case.recipe, shape, plan_weights(case.recipe, shape))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        save_tiny_llama(root / name, **{**WIDTHS, **changes})
    return root


class Measured:
    """Measures cases when the first of a handful is asked for."""

    def __init__(self, ranks: RankPool, models: Path) -> None:
        self._ranks = ranks
        self._models = models
        self._found: dict[str, dict[str, int]] = {}

    def __getitem__(self, name: str) -> dict[str, int]:
        if name not in self._found:
            num_ranks = CASES[name].num_ranks
            names = [each for each, case in CASES.items() if case.num_ranks == num_ranks]
            start = names.index(name) // HANDFUL * HANDFUL
            handful = names[start : start + HANDFUL]
            self._found |= self._ranks.run(num_ranks, measure, self._models, handful)[0]
        return self._found[name]


@pytest.fixture(scope="module")
def measured(ranks: RankPool, models: Path) -> Measured:
    return Measured(ranks, models)


@pytest.mark.parametrize("name", CASES)
def test_each_phase_allocates_what_is_planned(measured: Measured, models: Path, name: str) -> None:
    memory = plan(models / CASES[name].model, CASES[name])
    planned: dict[str, int] = {}
    for moment in memory.moments:
        held = sum(moment.parts.get(category, 0) for category in HELD_BEFORE)
        planned[moment.phase] = max(planned.get(moment.phase, 0), moment.allocated - held)
    # gloo frees its copies of what it reduced when its own thread comes to it: in the optimizer's
    # step there is little beside them.
    phases = ("forward", "backward", "optimizer")[: 3 if CASES[name].num_ranks == 1 else 2]
    for phase in phases:
        assert planned[phase] == pytest.approx(measured[name][phase], rel=TOLERANCE), phase
