"""Host memory of a plan: the measurements of one GPU, and what must hold for any recipe."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_recipe

from fsdpq.plan.costs.pinned import pinned_bytes
from fsdpq.plan.host import LAUNCHER_BYTES, TORCHRUN_BYTES, plan_host_memory
from fsdpq.plan.result import HostMemory
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.find import find_shape
from fsdpq.plan.weights import plan_weights
from fsdpq.recipe.root import Recipe

GIB = 2**30
LARGE = "meta-llama/Llama-2-70b-hf"


def recipe_of(ranks: int = 1, rows: int = 1, seq_len: int = 2048, **sections: Any) -> Recipe:
    sections.setdefault("fsdp", {})
    chunks = sections.pop("chunks", 1)
    return tiny_recipe(
        model={"dtype": "bf16"},
        adapter=sections.pop("adapter", {"rank": sections.pop("rank", 16), "alpha": 16.0}),
        data={"seq_len": seq_len},
        training={
            "micro_batch_size": rows, "global_batch_size": rows * ranks, "layer_chunks": chunks,
        },
        launch={"device": sections.pop("device", "cuda"), "nproc_per_node": ranks},
        **sections,
    )  # fmt: skip


def plan(recipe: Recipe, model: str = LARGE) -> HostMemory:
    shape = shape_of(model)
    return plan_host_memory(recipe, shape, plan_weights(recipe, shape))


def shape_of(model: str) -> ModelShape:
    shape = find_shape(model, Path())
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("rows", "chunks", "offloads_activations", "measured"),
    [
        (1, 1, False, 42.7),
        (2, 1, False, 42.7),
        (2, 1, True, 47.6),
        # Measured after the row before: its 79 buffers were used again, each twice as large as the
        # input of a chunk.
        (8, 8, True, 65.0 - 79 * 2**25 / GIB),
    ],
)
def test_host_memory_of_70b_is_what_an_h200s_host_gave(
    rows: int, chunks: int, offloads_activations: bool, measured: float
) -> None:
    """Resident memory of the one process, `docs/benchmarks/gpu.md`."""
    fsdp = {"offload": "cpu", "activation_offload": offloads_activations}
    planned = plan(recipe_of(rows=rows, chunks=chunks, fsdp=fsdp))
    own = planned.total - LAUNCHER_BYTES - TORCHRUN_BYTES
    assert own / GIB == pytest.approx(measured, rel=0.01)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097, 117 << 20)] == [
        0, 1, 4096, 8192, 128 << 20,
    ]  # fmt: skip


def test_ranks_share_what_is_offloaded() -> None:
    one, four = (plan(recipe_of(ranks, fsdp={"offload": "cpu"})) for ranks in (1, 4))
    for part in ("base", "trained", "gradients", "optimizer"):
        assert four.parts[part] == pytest.approx(one.parts[part], rel=0.01), part
    copies = plan(recipe_of(4, fsdp={"offload": "cpu", "strategy": "ddp"}))
    assert copies.parts["base"] == 4 * one.parts["base"]


def test_a_base_on_disk_is_pages_that_ranks_share() -> None:
    in_memory = plan(recipe_of(2, fsdp={"offload": "cpu"}))
    mapped = plan(recipe_of(2, fsdp={"offload": "disk"}))
    assert "base" not in mapped.parts
    weights = plan_weights(recipe_of(2, fsdp={"offload": "disk"}), shape_of(LARGE))
    assert mapped.file_backed_bytes == weights.whole.frozen
    assert mapped.peak < in_memory.peak / 3
    copies = plan(recipe_of(2, fsdp={"offload": "disk", "strategy": "ddp"}))
    assert copies.file_backed_bytes == mapped.file_backed_bytes, "two ranks map the same pages"


def test_trained_weights_on_the_device_take_nothing_of_the_host() -> None:
    kept = plan(recipe_of(fsdp={"offload": "cpu", "offload_trained": False}))
    assert set(kept.parts) == {"processes", "base"}
    assert set(plan(recipe_of()).parts) == {"processes"}


@pytest.mark.parametrize(
    ("checkpointing", "chunks", "inputs"),
    [("full", 1, 79), ("selective", 1, 39), ("full", 2, 79), ("full", 3, 79)],
)
def test_every_checkpointed_input_but_the_last_is_offloaded(
    checkpointing: str, chunks: int, inputs: int
) -> None:
    """The last layer's input is needed at once; chunks of 2 + 1 + 1 rows are rounded up each."""
    fsdp = {"activation_checkpointing": checkpointing, "activation_offload": True}
    planned = plan(recipe_of(rows=4, chunks=chunks, fsdp=fsdp))
    assert planned.parts["activations"] == inputs * 4 * 2048 * 8192 * 2


def test_no_input_is_kept_below_all_trained_layers() -> None:
    """8 new layers among 80: the first follows layer 10, which it is a copy of."""
    adapter = {"kind": "llama_pro", "num_new_layers": 8}
    recipe = recipe_of(fsdp={"activation_offload": True}, adapter=adapter)
    assert plan(recipe).parts["activations"] == (88 - 10 - 1) * 2048 * 8192 * 2


@pytest.mark.parametrize("setting", ["rows", "seq_len", "rank"])
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_host_memory_never_decreases(setting: str, offload: str) -> None:
    fsdp = {"offload": offload, "activation_offload": True}
    values = (8, 9, 64, 100, 2048) if setting == "seq_len" else (1, 2, 3, 8, 64)
    found = [plan(recipe_of(fsdp=fsdp, **{setting: value})) for value in values]
    for less, more in itertools.pairwise(found):
        assert more.peak >= less.peak
