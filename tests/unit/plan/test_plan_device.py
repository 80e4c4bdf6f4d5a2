"""Device memory of a plan: the measurements of one GPU, and what must hold for any recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_recipe

from fsdpq.adapter import dora, dora_product
from fsdpq.model import chunked_loss
from fsdpq.model.loading import source
from fsdpq.plan.device import load, loss, operations, plan_device_memory
from fsdpq.plan.device.notes import device_notes
from fsdpq.plan.result import RankMemory
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes import find_shape
from fsdpq.plan.weights import plan_weights
from fsdpq.quantization import bnb, hqq
from fsdpq.recipe.root import Recipe

GIB = 2**30
SMALL, LARGE = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"


def recipe_of(rows: int, seq_len: int, *, ranks: int = 1, chunks: int = 1, **more: Any) -> Recipe:
    rank = more.pop("rank", 16)
    batch = {"micro_batch_size": rows, "global_batch_size": rows * ranks, "layer_chunks": chunks}
    return tiny_recipe(
        **{
            "model": {"dtype": "bf16"},
            "adapter": {"kind": "lora", "rank": rank, "alpha": 16.0},
            "data": {"seq_len": seq_len},
            "training": batch,
            "launch": {"device": "cuda", "nproc_per_node": ranks},
            **more,
        }
    )


def plan(recipe: Recipe, model: str) -> RankMemory:
    shape = shape_of(model)
    return plan_device_memory(recipe, shape, plan_weights(recipe, shape))


def shape_of(model: str) -> ModelShape:
    shape = find_shape(model, Path())
    assert shape is not None
    return shape


def allocated(memory: RankMemory) -> int:
    return max(moment.allocated for moment in memory.moments)


OFF = {"offload": "cpu"}
OUT = {"offload": "cpu", "activation_offload": True}
MEASURED_7B = [
    (4, {}, 9.23),
    (1, {}, 6.60),
    (1, {"fsdp": {"activation_checkpointing": "selective"}}, 11.46),
    (1, {"fsdp": {"activation_checkpointing": "none"}}, 16.56),
    (1, {"fsdp": {"activation_offload": True}}, 6.60),
    (1, {"fsdp": OFF}, 1.14),
    (1, {"fsdp": {**OFF, "offload_trained": False}}, 3.06),
    (1, {"quantization": {"kind": "none"}}, 15.51),
    (1, {"adapter": {"kind": "dora", "rank": 64}}, 6.75),
]
MEASURED_70B = [
    (1, 2048, {"fsdp": OFF}, 4.20),
    (2, 2048, {"fsdp": OFF}, 7.46),
    (2, 2048, {"fsdp": OUT}, 2.59),
    (8, 2048, {"fsdp": OUT, "chunks": 8}, 3.56),
    (1, 8192, {"fsdp": OUT}, 4.53),
    (1, 2048, {"fsdp": OUT}, 1.77),
    (1, 2048, {}, 39.98),
    (2, 2048, {}, 43.24),
]


@pytest.mark.parametrize(("rows", "sections", "measured"), MEASURED_7B)
def test_peak_of_7b_is_what_an_h200_allocated(
    rows: int, sections: dict[str, Any], measured: float
) -> None:
    """``docs/benchmarks/gpu.md``, LoRA of rank 64; adapters were in FSDP's groups then, which
    takes up to 0.1 GiB more where one rank has its base on the device."""
    planned = plan(recipe_of(rows, 2048, rank=64, **sections), SMALL)
    assert allocated(planned) / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("rows", "seq_len", "sections", "measured"), MEASURED_70B)
def test_peak_of_70b_is_what_an_h200_allocated(
    rows: int, seq_len: int, sections: dict[str, Any], measured: float
) -> None:
    planned = plan(recipe_of(rows, seq_len, **sections), LARGE)
    # The table has two digits.
    assert allocated(planned) / GIB == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    ("model", "ranks", "sections", "traced", "moment"),
    [
        ("meta-llama/Llama-3.1-405B", 8, OUT, 9.8095, "gathering the head"),
        (LARGE, 2, {"activation_offload": True, "precision": "bf16"}, 22.1742, None),
        (SMALL, 2, {}, 4.0113, "the loss"),
    ],
)
def test_peak_of_rank_0_is_what_a_trace_of_its_step_says(
    model: str, ranks: int, sections: dict[str, Any], traced: float, moment: str | None
) -> None:
    """``docs/benchmarks/proof.md``. A head as large as two layers is copied out beside the last
    layer's buffer, which takes more than the loss: nothing smaller than 405B shows it."""
    planned = plan(recipe_of(1, 2048, ranks=ranks, rank=64, fsdp=sections), model).peak
    without_workspace = planned.allocated - planned.parts["workspace"]
    assert without_workspace / GIB == pytest.approx(traced, rel=0.001)
    assert moment in (None, planned.name)


RECIPES = st.fixed_dictionaries(
    {
        "ranks": st.sampled_from([1, 2, 4]),
        "fsdp": st.fixed_dictionaries(
            {
                "strategy": st.sampled_from(["full_shard", "shard_grad_op", "ddp"]),
                "offload": st.sampled_from(["none", "cpu", "disk"]),
                "offload_trained": st.booleans(),
                "activation_checkpointing": st.sampled_from(["full", "selective", "none"]),
            }
        ),
        "quantization": st.sampled_from([{"kind": "bnb"}, {"kind": "hqq"}, {"kind": "none"}]),
        "kind": st.sampled_from(["lora", "dora"]),
        "device": st.sampled_from(["cuda", "cpu"]),
        "model": st.sampled_from([SMALL, "Qwen/Qwen3-30B-A3B", "google/gemma-2-9b"]),
    }
)


def drawn(rows: int, seq_len: int, rank: int, chosen: dict[str, Any]) -> RankMemory:
    recipe = recipe_of(
        rows,
        seq_len,
        ranks=chosen["ranks"],
        fsdp=chosen["fsdp"],
        quantization=chosen["quantization"],
        adapter={"kind": chosen["kind"], "rank": rank, "alpha": 16.0},
        launch={"device": chosen["device"], "nproc_per_node": chosen["ranks"]},
    )
    return plan(recipe, chosen["model"])


@settings(max_examples=25, deadline=None)
@given(chosen=RECIPES, more=st.sampled_from(["rows", "seq_len", "rank"]))
def test_more_tokens_and_higher_ranks_never_take_less(chosen: dict[str, Any], more: str) -> None:
    sizes = {"rows": 2, "seq_len": 640, "rank": 8}
    small = drawn(**sizes, chosen=chosen)
    large = drawn(**{**sizes, more: sizes[more] + 1}, chosen=chosen)
    for one, other in zip(small.moments, large.moments, strict=True):
        assert one.name == other.name
        for category, num_bytes in one.parts.items():
            assert num_bytes > 0, (one.name, category)
        assert one.total <= other.total, one.name


@settings(max_examples=15, deadline=None)
@given(chosen=RECIPES)
def test_shards_are_those_of_the_weights(chosen: dict[str, Any]) -> None:
    memory = drawn(1, 256, 8, chosen)
    held = memory.moments[-1].parts
    fsdp = {**chosen["fsdp"]}
    recipe = recipe_of(
        1,
        256,
        ranks=chosen["ranks"],
        fsdp=fsdp,
        quantization=chosen["quantization"],
        adapter={"kind": chosen["kind"], "rank": 8, "alpha": 16.0},
        launch={"device": chosen["device"], "nproc_per_node": chosen["ranks"]},
    )
    shard = plan_weights(recipe, shape_of(chosen["model"])).shard
    on_gpu = chosen["device"] == "cuda"
    offload = fsdp["offload"]
    frozen = shard.frozen if offload == "none" or (offload == "cpu" and not on_gpu) else 0
    trained = offload == "none" or not on_gpu or not fsdp["offload_trained"]
    assert sum(held.get(category, 0) for category in ("codes", "scales", "plain")) == frozen
    assert held.get("trained", 0) == (shard.trained if trained else 0)
    assert held.get("optimizer", 0) == (shard.optimizer if trained else 0)
    assert held.get("gradients", 0) == (shard.trained if trained else 0)


def test_one_rank_gathers_nothing_and_two_gather_a_layer_and_the_next() -> None:
    alone = plan(recipe_of(1, 512), SMALL).phase_peak("backward")
    assert alone is not None
    assert "gathered" not in alone.parts
    recipe = recipe_of(1, 512, ranks=2)
    shape = shape_of(SMALL)
    weights = plan_weights(recipe, shape)
    both = plan_device_memory(recipe, shape, weights).phase_peak("backward")
    assert both is not None
    [layer] = weights.layers
    rest = sum(group.gathered_bytes for group in weights.groups if group.name == "root")
    assert both.parts["gathered"] - rest in (layer.gathered_bytes, 2 * layer.gathered_bytes)


def test_a_gpu_takes_more_than_torch_hands_out() -> None:
    gpu = plan(recipe_of(1, 2048, fsdp=OUT), LARGE).peak
    # Measured with this recipe: 1.77 GiB allocated, 2.45 reserved, 3.4 of the device.
    assert gpu.total / GIB == pytest.approx(3.4, rel=0.05)


def test_what_is_not_planned_is_said() -> None:
    shape = shape_of(SMALL)
    assert not list(device_notes(recipe_of(1, 512), shape))
    compiled = recipe_of(1, 512, training={"micro_batch_size": 1, "compile": True})
    assert "compiled" in next(device_notes(compiled, shape))
    falcon = dataclasses.replace(shape, model_type="falcon")
    assert "`falcon`" in next(device_notes(recipe_of(1, 512), falcon))


def test_sizes_of_chunks_are_those_of_the_worker() -> None:
    assert loss.MAX_CHUNK_LOGITS == chunked_loss.MAX_CHUNK_LOGITS
    assert loss.MAX_CHUNK_LOGITS_CPU == chunked_loss.MAX_CHUNK_LOGITS_CPU
    assert operations.COLUMN_CHUNK == dora_product.CHUNK_ELEMENTS
    assert load.COPY_BYTES == source.COPY_ROWS_BYTES
    assert load.BNB_CHUNK == bnb.MAX_CHUNK_ELEMENTS
    assert load.BNB_CHUNKS == bnb.MIN_CHUNKS
    assert load.HQQ_BLOCK == hqq.BLOCK_WEIGHTS
    assert load.NORM_CHUNK == dora.NORM_CHUNK_WEIGHTS
