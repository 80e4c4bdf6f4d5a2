"""The step under fake tensors allocates what the step does, and what the plan says.

Two ways to the same numbers that share no code: the worker's own step, and arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.alone import run_alone

from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.host import plan_host_memory
from fsdpq.plan.result import Moment
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.traced import Traced
from fsdpq.plan.weights import plan_weights
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.bench.allocations import Allocations

BESIDE = ("workspace", "context", "fragmentation")
"""Categories that no operator allocates."""

SMALL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = SMALL | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
NONE = {"kind": "none"}
DORA = {"kind": "dora", "rank": 16, "alpha": 32.0, "dropout": 0.1}


@dataclass(frozen=True)
class Case:
    """A recipe to be traced."""

    num_ranks: int = 2
    sections: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: SMALL)
    device: str = "cuda"
    rows: int = 2
    tokens: int = 512

    def recipe(self) -> Recipe:
        """Returns it, resolved."""
        document: dict[str, Any] = {
            "version": 1,
            "name": "traced",
            "model": {"name_or_path": "x", "dtype": "bf16"},
            "quantization": {"kind": "bnb", "quant_type": "nf4", "double_quant": True},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
            "fsdp": {},
            "data": {"path": "rows.jsonl", "seq_len": self.tokens},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "lr_scheduler": {"kind": "constant"},
            "training": {
                "steps": 1,
                "micro_batch_size": self.rows,
                "global_batch_size": self.rows * self.num_ranks,
            },
            "launch": {"device": self.device, "nproc_per_node": self.num_ranks},
        }
        for section, changes in self.sections.items():
            document[section] = changes if "kind" in changes else document[section] | changes
        return Recipe.model_validate(document)


CASES = {
    "one rank": Case(1),
    "dora, dropout": Case(2, {"adapter": DORA}),
    "full finetuning, eager": Case(
        2,
        {"adapter": NONE, "quantization": NONE, "model": {"attn_implementation": "eager"}},
    ),
    "hqq on 8 ranks, nothing recomputed": Case(
        8,
        {
            "quantization": {"kind": "hqq", "nbits": 4},
            "fsdp": {"activation_checkpointing": "none"},
        },
    ),
    "shard_grad_op, selective": Case(
        2,
        {"fsdp": {"strategy": "shard_grad_op", "activation_checkpointing": "selective"}},
        SMALL | {"num_hidden_layers": 4},
    ),
    "one rank, both offloads": Case(1, {"fsdp": {"offload": "cpu", "activation_offload": True}}),
    "hybrid, bf16 base": Case(
        4,
        {"quantization": NONE, "fsdp": {"strategy": "hybrid_full_shard", "shard_size": 2}},
    ),
    "ddp, chunks, two micro-batches": Case(
        2,
        {
            "fsdp": {"strategy": "ddp"},
            "training": {"layer_chunks": 2, "global_batch_size": 8},
        },
    ),
    "70B's layers, offload": Case(8, {"fsdp": {"offload": "cpu"}}, LLAMA_70B, rows=1, tokens=2048),
}
MEASURED = "2 ranks"
REAL = {
    MEASURED: Case(2, device="cpu"),
    "full finetuning, nothing recomputed": Case(
        1,
        {
            "adapter": NONE,
            "quantization": NONE,
            "model": {"dtype": "fp32", "attn_implementation": "eager"},
            "fsdp": {"activation_checkpointing": "none"},
        },
        device="cpu",
        tokens=256,
    ),
}


def trace_all(root: Path) -> dict[str, dict[str, Any]]:
    """Returns the trace of every case."""
    from fsdpq.worker.plan_trace.run import trace_step

    return {
        name: trace_step(case.recipe(), root / name).as_json()
        for name, case in (CASES | REAL).items()
    }


def allocate_all(root: Path) -> dict[str, dict[str, int]]:
    """Returns what torch's allocator hands out in the phases of two real steps of `REAL`."""
    from fsdpq.worker.plan_trace.run import full_step
    from fsdpq.worker.plan_trace.unreal_gpu import unreal_group
    from fsdpq.worker.random_base import EmptySource, assemble_random

    cpu, found = torch.device("cpu"), {}
    for name, case in REAL.items():
        recipe = case.recipe()
        work = workload_of(recipe)
        with unreal_group(work), Allocations() as allocations:
            assembled = assemble_random(recipe, root / name, device=cpu, source=EmptySource())
            optimizer = resolve_builder("optimizer", recipe.optimizer)(
                recipe.optimizer, assembled.named_trainable
            )
            allocations.end_phase("load")
            for _ in range(2):
                train_step(
                    assembled.model, full_step(work), optimizer=optimizer,
                    parameters=assembled.trainable, max_grad_norm=None, device=cpu,
                    mode=StepMode(on_phase=allocations.end_phase),
                )  # fmt: skip
        found[name] = allocations.phase_peaks()
    return found


def refuse(root: Path) -> list[str]:
    """Returns what a trace says to a mixture of experts, and to a model of other weights."""
    from fsdpq.errors import PlanError
    from fsdpq.worker.plan_trace.run import trace_step

    mixture = SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    (root / "mixture").mkdir()
    (root / "mixture/config.json").write_text(json.dumps(mixture))
    refusals: list[str] = []
    for directory, num_weights in (("mixture", None), ("one rank", 1)):
        try:
            trace_step(CASES["one rank"].recipe(), root / directory, num_weights=num_weights)
        except PlanError as error:
            refusals.append(error.message)
    return refusals


@dataclass(frozen=True)
class Found:
    """What a process of its own found out.

    Attributes:
        traced: the trace of every case.
        allocated: bytes by phase that the real steps of `REAL` had from torch's allocator.
        measured: the measurement of a case of `REAL`.
        refusals: messages.
    """

    traced: dict[str, Traced]
    allocated: dict[str, dict[str, int]]
    measured: Traced
    refusals: list[str]


def find_all(root: Path) -> dict[str, Any]:
    """Returns all of it, as plain data."""
    from fsdpq.worker.plan_trace.measured import measure_step

    return {
        "measured": measure_step(REAL[MEASURED].recipe(), root / MEASURED).as_json(),
        "allocated": allocate_all(root),
        "traced": trace_all(root),
        "refusals": refuse(root),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, case in (CASES | REAL).items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(case.model))
    return root


@pytest.fixture(scope="module")
def found(models: Path) -> Found:
    rows = run_alone(find_all, models)
    return Found(
        traced={name: Traced.from_json(row) for name, row in rows["traced"].items()},
        allocated=rows["allocated"],
        measured=Traced.from_json(rows["measured"]),
        refusals=rows["refusals"],
    )


@pytest.fixture(scope="module")
def traced(found: Found) -> dict[str, Traced]:
    return found.traced


def planned(case: Case, directory: Path) -> list[Moment]:
    recipe, shape = case.recipe(), shape_from_directory(directory)
    moments = plan_device_memory(recipe, shape, plan_weights(recipe, shape)).moments
    return [
        Moment(m.phase, m.name, {k: n for k, n in m.parts.items() if k not in BESIDE})
        for m in moments
    ]


@pytest.mark.parametrize("name", CASES)
def test_plan_and_trace_agree_phase_by_phase(
    name: str, traced: dict[str, Traced], models: Path
) -> None:
    plan = planned(CASES[name], models / name)
    for moment in traced[name].device.moments:
        ours = max((m for m in plan if m.phase == moment.phase), key=lambda m: m.total)
        # 256 KiB: hundreds of tensors of a tiny model, each rounded to 512 bytes.
        assert ours.total == pytest.approx(moment.total, rel=0.05, abs=1 << 18), moment.phase


def test_plan_and_trace_agree_by_category(traced: dict[str, Traced], models: Path) -> None:
    """A category may be larger in one of both where its moment is another one of the phase."""
    for name, case in CASES.items():
        plan = planned(case, models / name)
        for moment in traced[name].device.moments:
            ours = [m for m in plan if m.phase == moment.phase]
            near = min(ours, key=lambda m: _distance(m, moment))
            slack = 0.05 * moment.total + (1 << 18)
            for category, num_bytes in moment.parts.items():
                assert near.parts.get(category, 0) == pytest.approx(num_bytes, abs=slack), (
                    name, moment.phase, category,
                )  # fmt: skip


def _distance(one: Moment, other: Moment) -> int:
    categories = one.parts.keys() | other.parts.keys()
    return sum(abs(one.parts.get(c, 0) - other.parts.get(c, 0)) for c in categories)


def test_host_holds_what_the_plan_says_where_shards_are_offloaded(
    traced: dict[str, Traced], models: Path
) -> None:
    for name in ("one rank, both offloads", "70B's layers, offload"):
        case, host = CASES[name], traced[name].host
        recipe, shape = case.recipe(), shape_from_directory(models / name)
        weights = plan_weights(recipe, shape)
        shard = weights.shard
        assert host["codes"] == shard.codes
        assert host["trained"] == shard.trained
        assert host["optimizer"] >= 2 * shard.trained, "two moments of AdamW"
        plan = plan_host_memory(recipe, shape, weights)
        own = sum(host.values())
        assert own <= plan.total / case.num_ranks, "pinned memory is rounded up"
    device = traced["70B's layers, offload"].device
    assert all(not m.parts.get("codes") for m in device.moments), "they lie on the host"


def test_trace_is_what_the_step_allocates(found: Found) -> None:
    for name in REAL:
        for moment in found.traced[name].device.moments:
            # Kernels of a CPU take workspaces that fake tensors do not show.
            real = found.allocated[name][moment.phase]
            assert moment.total == pytest.approx(real, rel=0.02), (name, moment)


def test_measurement_takes_what_the_trace_says_beside_the_process(found: Found) -> None:
    measured, trace = found.measured, found.traced[MEASURED]
    peaks = {m.phase: m.total for m in measured.device.moments}
    assert list(peaks) == ["load", "forward", "backward", "optimizer"]
    step = {m.phase: m.total for m in trace.device.moments}
    # Resident memory: what the process has had and given back is used again.
    assert peaks["forward"] > 0.5 * step["forward"]
    assert measured.notes, "several ranks: weights are zeros"


def test_trace_refuses_what_depends_on_values_and_another_model(found: Found) -> None:
    experts, other_model = found.refusals
    assert "mixture of experts" in experts
    assert "weights" in other_model
