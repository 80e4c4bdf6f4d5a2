"""Compiled layers train as the same layers uncompiled, in few graphs and without breaks.

``aot_eager`` makes the graphs, forward and backward, that inductor gets, and runs them as they are:
what may differ is the graphs, so equality is to the bit. One test pays for inductor.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama
from torch._dynamo.utils import counters
from transformers.cache_utils import DynamicCache

from fsdpq.data.dealing.collate import build_step
from fsdpq.fsdp import compiled_layers
from fsdpq.training.step import evaluate

Result = tuple[list[float], list[float], float, dict[str, int]]


def run(directory: Path, backend: str | None, sections: dict[str, Any], longest: int) -> Result:
    """Trains two steps and answers, compiled by ``backend`` or, with None, as it is.

    Rows of several lengths are evaluated too.

    Ranks: all (collective).
    """
    torch._dynamo.reset()
    counters.clear()
    compiled_layers._compiled_class.cache_clear()
    compiled_layers.BACKEND = backend or "inductor"
    torch._dynamo.config.recompile_limit = 8  # torch's own, which the code raises
    training = sections.get("training", {}) | {"compile": backend is not None}
    assembled = assemble(directory, **(sections | {"training": training}))
    rows = random_rows(16, shortest=12, longest=longest)
    torch.manual_seed(0)  # dropout
    losses, norms = train(
        assembled, [rows[:8], rows[8:]], micro_batch_size=2, lr=1e-3, max_norm=1.0
    )
    loss = 0.0
    if longest > 12:
        held_out = build_step(rows[:4], micro_batch_size=4, rank=0, world_size=1)
        loss = evaluate(assembled.model, [held_out], device=CPU)
    graphs = counters["stats"]["unique_graphs"]
    cache = DynamicCache(config=assembled.model.hf.config)
    assembled.model.eval()
    for ids in ([[5, 6, 7]], [[8]], [[9]]):
        assembled.model.next_token_logits(torch.tensor(ids), cache)
    assert counters["stats"]["unique_graphs"] == graphs, "generation must not compile"
    breaks = sum(counters["graph_break"].values())
    return losses, norms, loss, {"graphs": graphs, "breaks": breaks}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


LORA = {"adapter": {"dropout": 0.3}}
DORA = {
    "training": {"layer_chunks": 2},
    "fsdp": {
        "activation_checkpointing": "selective",
        "activation_offload": True,
        "precision": "bf16_autocast",
    },
    "quantization": {"kind": "hqq", "nbits": 4},
    "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "up_proj"]},
}
FEW = {"adapter": {"target_modules": ["q_proj", "down_proj"]}}


@pytest.mark.parametrize(
    ("sections", "num_ranks", "num_graphs", "rel"),
    # Layers whose input is frozen or trained, and evaluation; each at the first length and at all;
    # chunks of one row are a shape of their own. DoRA's product is traced in another order of
    # roundings, here of bf16.
    [(LORA, 2, 5, 0.0), (DORA, 1, 8, 2e-3)],
    ids=["lora", "dora"],
)
def test_compiled_layers_compute_the_same(
    ranks: RankPool,
    directory: Path,
    sections: dict[str, Any],
    num_ranks: int,
    num_graphs: int,
    rel: float,
) -> None:
    plain = ranks.run(num_ranks, run, directory, None, sections, 24)
    compiled = ranks.run(num_ranks, run, directory, "aot_eager", sections, 24)
    for (losses, norms, held_out, counts), expected in zip(compiled, plain, strict=True):
        assert [*losses, held_out] == pytest.approx([*expected[0], expected[2]], rel=rel, abs=0)
        assert norms == pytest.approx(expected[1], rel=10 * rel, abs=0)
        assert counts["breaks"] == 0
        assert 0 < counts["graphs"] <= num_graphs
        assert expected[3]["graphs"] == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++")
def test_inductor_gives_the_losses_of_uncompiled_layers(ranks: RankPool, directory: Path) -> None:
    # One length and no evaluation: two graphs, each compiled once.
    plain = ranks.run(1, run, directory, None, FEW, 12)[0]
    compiled = ranks.run(1, run, directory, "inductor", FEW, 12)[0]
    # fp32; fused kernels sum in another order.
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
    assert compiled[3] == {"graphs": 2, "breaks": 0}
