"""Host memory of a plan beside the resident memory of two real ranks, whose weights are zeros."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.sharded import CPU, do_step
from support.tiny import random_rows, tiny_recipe
from transformers import LlamaConfig

from fsdpq.data.dealing.collate import build_step
from fsdpq.dist import rank
from fsdpq.metrics.memory import MemoryLog
from fsdpq.plan.host import CPU_RANK_BYTES, LATE_BYTES, plan_host_memory
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.weights import plan_weights
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.worker.random_base import EmptySource, assemble_random

NUM_RANKS = 2
M_MMAP_THRESHOLD = -3
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora over nf4, ddp": (6, {"model": {"dtype": "bf16"}, "fsdp": {"strategy": "ddp"}}),
    "lora over bf16": (6, {"model": {"dtype": "bf16"}, "quantization": {"kind": "none"}}),
    "full finetuning": (3, {"quantization": {"kind": "none"}, "adapter": {"kind": "none"}}),
}
"""Layers and sections: enough of the one for weights to outweigh what is imported late."""


class Rows:
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def write(self, row: Any) -> None:
        self.rows.append(row)


def measure_growth(directory: Path, sections: dict[str, Any]) -> int:
    """Returns by how much a rank grew at most, in bytes, pages of files left out."""
    # glibc's heap would keep holes, 0 to 350 MiB of them: `HEAP_BYTES`.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    sink, recipe = Rows(), recipe_of(sections)
    log = MemoryLog(sink, CPU)
    log("start")
    assembled = assemble_random(recipe, directory, device=CPU, source=EmptySource())
    assembled.model.train()
    log("load")
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, assembled.named_trainable)
    rows = random_rows(NUM_RANKS, shortest=32, longest=32)
    step = build_step(rows, micro_batch_size=1, rank=rank(), world_size=NUM_RANKS)
    for _ in range(2):
        do_step(assembled, optimizer, step)
        log("step")
    start = sink.rows[0]["anonymous_bytes"]
    return max(r["peak_bytes"] - (r["bytes"] - r["anonymous_bytes"]) - start for r in sink.rows)


def recipe_of(sections: dict[str, Any]) -> Recipe:
    batch = {"micro_batch_size": 1, "global_batch_size": NUM_RANKS}
    return tiny_recipe(data={"seq_len": 32}, training=batch, **sections)


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[RankPool]:
    """Ranks whose heaps no other test has used."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("name", SETTINGS)
def test_plan_is_resident_memory(fresh_ranks: RankPool, tmp_path: Path, name: str) -> None:
    num_layers, sections = SETTINGS[name]
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=num_layers, vocab_size=8192,
        num_attention_heads=16, num_key_value_heads=4, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    recipe, shape = recipe_of(sections), shape_from_directory(tmp_path)
    parts = plan_host_memory(recipe, shape, plan_weights(recipe, shape)).parts
    planned = sum(parts.values()) - parts["processes"] - parts["heap"]
    grown = fresh_ranks.run(NUM_RANKS, measure_growth, tmp_path, sections)
    # The ranks are forks that have imported nearly all of it: what a rank of a run starts with is
    # held by `tests/e2e/test_train_command.py`. What is imported late comes in the first test only.
    # Without weights or states it would be 15% and more.
    measured = sum(grown) + NUM_RANKS * CPU_RANK_BYTES
    assert planned + NUM_RANKS * (CPU_RANK_BYTES + LATE_BYTES) == pytest.approx(measured, rel=0.1)
