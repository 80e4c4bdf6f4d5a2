"""What the plan says that a step computes and moves is what a real step does.

Products are counted by torch's own counter, which knows nothing of the plan, and collectives in the
dispatcher, on 2 and 4 gloo ranks. With ``eager`` attention every product is an operator that is
counted; the kernels that ``sdpa`` runs on a CPU are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.step_counts import StepCounts, count_steps
from support.tiny import save_tiny_llama, tiny_recipe

from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.time.traffic import step_traffic
from fsdpq.plan.time.work import step_work
from fsdpq.plan.weights import plan_weights

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"tied": False},
    "gemma2": {"family": "gemma2", "head_dim": 48, "num_hidden_layers": 2},
    "fused projections": {"family": "phi3", "num_hidden_layers": 2},
    "parallel feed-forward": {"family": "gpt_neox", "num_hidden_layers": 2},
    "mixture": {
        "family": "qwen3_moe",
        "tied": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 48,
        "num_hidden_layers": 2,
    },
}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
DORA = {"kind": "dora", "rank": 4, "alpha": 8.0}
NONE = {"kind": "none"}

Sections = dict[str, dict[str, Any]]


def case(model: str = "untied", **sections: dict[str, Any]) -> tuple[str, Sections]:
    base: Sections = {
        "model": {"attn_implementation": "eager"},
        "data": {"seq_len": 24},
        "training": {"micro_batch_size": 2, "global_batch_size": 4},
    }
    return model, base | sections


CASES: dict[str, tuple[str, Sections]] = {
    "lora": case(),
    "four micro-batches": case(training={"micro_batch_size": 1, "global_batch_size": 8}),
    "one, layers in four chunks": case(
        training={"micro_batch_size": 4, "global_batch_size": 8, "layer_chunks": 4}
    ),
    "nothing computed again": case(fsdp={"activation_checkpointing": "none"}),
    "every second layer computed again": case(fsdp={"activation_checkpointing": "selective"}),
    "two of the linears": case(adapter=LORA | {"target_modules": ["q_proj", "v_proj"]}),
    "last linear only": case(adapter=LORA | {"target_modules": ["down_proj"]}),
    "layers from the second on": case(adapter=LORA | {"target_modules": r".*layers\.[12]\..*"}),
    "bf16 base": case(quantization=NONE),
    "head and norms saved": case(
        adapter=LORA | {"modules_to_save": ["lm_head", "input_layernorm"]}
    ),
    "embedding saved": case(adapter=LORA | {"modules_to_save": ["embed_tokens"]}),
    "dora with dropout": case(adapter=DORA | {"dropout": 0.1}),
    "dora in chunks": case(adapter=DORA, training={"layer_chunks": 2, "global_batch_size": 4}),
    "llama pro": case(adapter={"kind": "llama_pro", "num_new_layers": 1}),
    "full finetuning": case(adapter=NONE, quantization=NONE),
    "muon": case(optimizer={"kind": "muon", "lr": 1e-3}),
    "norm behind the feed-forward": case("gemma2"),
    "mixture": case("mixture"),
    "fused projections": case("fused projections"),
    "parallel feed-forward": case("parallel feed-forward"),
    "weights kept until backward, gradients reduced once": case(
        fsdp={"strategy": "shard_grad_op", "no_sync": True}, training={"global_batch_size": 8}
    ),
    "copies": case(fsdp={"strategy": "ddp"}),
}
FULL: Sections = {"adapter": NONE, "quantization": NONE}


def on_four(model: str = "untied", **sections: dict[str, Any]) -> tuple[str, Sections]:
    return case(model, **{"launch": {"nproc_per_node": 4}, **sections})


FOUR_RANKS: dict[str, tuple[str, Sections]] = {
    "copies of shards": on_four(fsdp={"strategy": "hybrid_full_shard", "shard_size": 2}),
    "copies of shards that are kept": on_four(
        fsdp={"strategy": "hybrid_shard_grad_op", "shard_size": 2}, **FULL
    ),
    "shards": on_four(),
    "shards of all weights": on_four(**FULL),
    "shards that are kept": on_four(fsdp={"strategy": "shard_grad_op"}),
    "shards of fewer rows than ranks": on_four(adapter=LORA | {"rank": 2}),
    "copies on four": on_four(fsdp={"strategy": "ddp"}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_llama(root / name, **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def on_four_ranks(ranks: RankPool, directories: dict[str, Path]) -> list[dict[str, StepCounts]]:
    return ranks.run(4, count_steps, directories, FOUR_RANKS)


@pytest.fixture(scope="module")
def counted(
    ranks: RankPool, directories: dict[str, Path], on_four_ranks: list[dict[str, StepCounts]]
) -> dict[str, StepCounts]:
    two = ranks.run(2, count_steps, directories, CASES)[0]
    return two | on_four_ranks[0]


@pytest.mark.parametrize("name", [*CASES, *FOUR_RANKS])
def test_plan_counts_what_a_step_does(
    name: str, counted: dict[str, StepCounts], directories: dict[str, Path]
) -> None:
    model, sections = (CASES | FOUR_RANKS)[name]
    recipe, shape = tiny_recipe(**sections), shape_from_directory(directories[model])
    work, real = step_work(recipe, shape), counted[name]
    traffic = step_traffic(recipe, shape, plan_weights(recipe, shape))

    # Where keys of the first layer have no gradient, `eager` saves a product that kernels do not.
    saved = 2e-3 if name == "two of the linears" else 0.0
    assert work.flops == pytest.approx(real.flops, rel=saved)
    assert traffic.gathered == real.gathered
    assert traffic.reduced == real.reduced
    assert traffic.summed == real.summed
    if name != "muon":
        assert traffic.num_gathers + traffic.num_reductions == sum(not c.is_sum for c in real.calls)
    assert traffic.num_sums == sum(c.is_sum for c in real.calls)


@pytest.mark.parametrize("num_local_ranks", [1, 2])
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_plan_counts_what_comes_into_a_machine(
    name: str,
    num_local_ranks: int,
    on_four_ranks: list[dict[str, StepCounts]],
    directories: dict[str, Path],
) -> None:
    """Four ranks as two machines and as four: what rings bring in, over the groups that there were.

    Every collective is noted by all ranks of its group, and counts once.
    """
    model, sections = FOUR_RANKS[name]
    launch = {"nproc_per_node": num_local_ranks, "nnodes": 4 // num_local_ranks}
    recipe = tiny_recipe(**sections | {"launch": launch})
    shape = shape_from_directory(directories[model])
    calls = [
        call
        for rank, counts in enumerate(on_four_ranks)
        for call in counts[name].calls
        if call.ranks[0] == rank
    ]
    come_in = sum(call.bytes_into(0, num_local_ranks) for call in calls)
    assert step_traffic(recipe, shape, plan_weights(recipe, shape)).network == come_in
    assert come_in > 0


@pytest.mark.parametrize("name", ["lora", "dora in chunks", "layers from the second on", "mixture"])
def test_offload_copies_the_shards_that_go_into_gathers(
    name: str, counted: dict[str, StepCounts], directories: dict[str, Path]
) -> None:
    model, sections = CASES[name]
    shape = shape_from_directory(directories[model])
    on_gpu = sections | {"launch": {"device": "cuda"}, "fsdp": {"offload": "cpu"}}
    recipe = tiny_recipe(**on_gpu)
    traffic = step_traffic(recipe, shape, plan_weights(recipe, shape))
    assert traffic.shards_to_device == counted[name].own


def test_chunks_gather_once_where_micro_batches_gather_each(counted: dict[str, StepCounts]) -> None:
    each, once = counted["four micro-batches"], counted["one, layers in four chunks"]
    assert each.gathered == 4 * once.gathered
    assert each.flops == once.flops
