"""Mixtures of experts: rows found in the checkpoint's own layout, trained without whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import reference
from support.alive import alive_tensors
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama
from test_memory import saved_tensors
from torch import Tensor

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.errors import CheckpointError
from fsdpq.model.quantized_experts import PackedExperts, QuantizedExperts

NUM_STEPS, BATCH, LR, MAX_NORM = 3, 4, 1e-3, 1.0
MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2}


def save_mixtral(directory: Path) -> Path:
    """Saves a tiny Mixtral; five experts divide by no number of ranks."""
    return save_tiny_llama(directory, tied=False, family="mixtral", **MIXTRAL)


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def train_sharded(directory: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Trains on this rank."""
    assembled = assemble(directory, **sections)
    layers = assembled.adapted_layers
    initial = {n: gather_whole(m.lora_A).clone() for n, m in layers.items()}  # pyright: ignore
    losses, norms = train(assembled, batches(), micro_batch_size=2, lr=LR, max_norm=MAX_NORM)
    share = assembled.num_quantized / assembled.num_parameters
    return {"initial": initial, "losses": losses, "norms": norms, "share": share}


def test_sharded_mixtral_equals_unsharded_peft(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_mixtral(tmp_path)
    one = ranks.run(1, train_sharded, directory, {})[0]
    two = ranks.run(2, train_sharded, directory, {})[0]
    assert one["share"] > 0.9
    assert {name.rpartition(".")[2] for name in one["initial"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    model = reference.with_peft_lora(reference.load_dequantized(directory), one["initial"], rank=4)
    losses, norms = reference.train(model, batches(), lr=LR, max_norm=MAX_NORM)
    for answer in (one, two):
        # fp32 sums in another order, amplified by Adam: 1e-5 relative.
        assert answer["losses"] == pytest.approx(losses, rel=1e-5)
        assert answer["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    "quantization",
    [
        {"kind": "hqq", "nbits": 3, "group_size": 64},
        {"kind": "none"},
        {"kind": "bnb", "modules_to_not_convert": ["experts"]},
    ],
)
def test_three_ranks_equal_one(
    ranks: RankPool, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    directory = save_mixtral(tmp_path)
    sections = {"quantization": quantization}
    one = ranks.run(1, train_sharded, directory, sections)[0]
    three = ranks.run(3, train_sharded, directory, sections)[0]
    assert len(set(one["losses"])) == NUM_STEPS
    assert three["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert three["norms"] == pytest.approx(one["norms"], rel=1e-5)


def kept_by_backward(directory: Path) -> dict[str, Any]:
    """Returns the floating-point shapes that a forward without checkpointing leaves alive."""
    assembled = assemble(directory, fsdp={"activation_checkpointing": "none"})
    [batch] = build_step(random_rows(2), micro_batch_size=2, rank=0, world_size=1).micro_batches
    before = {id(t) for t in alive_tensors()}
    with saved_tensors() as kept:
        loss = assembled.model(batch.input_ids, batch.loss_positions, batch.targets)
    # What a Function keeps on its own, past the hooks, the garbage collector finds.
    kept += [t for t in alive_tensors() if id(t) not in before]
    loss.backward()
    stacks = [m for m in assembled.model.modules() if isinstance(m, PackedExperts)]
    return {
        "experts": {(m.rows_per_expert, m.in_features) for m in stacks},
        "kept": {tuple(t.shape) for t in kept if t.is_floating_point()},
        "weights": any(
            p.is_floating_point()
            for m in assembled.model.modules()
            if isinstance(m, QuantizedExperts)
            for p in m.parameters()
        ),
    }


def test_backward_keeps_no_dequantized_expert(ranks: RankPool, tmp_path: Path) -> None:
    answer = ranks.run(1, kept_by_backward, save_mixtral(tmp_path))[0]
    assert answer["kept"]
    assert not answer["weights"]
    both = answer["experts"] | {shape[::-1] for shape in answer["experts"]}
    assert not both & answer["kept"]


def load_error(directory: Path) -> str:
    """Returns what loading says."""
    try:
        assemble(directory)
    except CheckpointError as error:
        return error.message
    return ""


def _without(directory: Path, name: str) -> Path:
    path = directory / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_a_missing_expert_is_noticed(ranks: RankPool, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    message = ranks.run(1, load_error, _without(save_mixtral(tmp_path), name))[0]
    assert "`model.layers.1.mlp.experts.gate_up_proj` needs as many experts of each kind" in message
    assert "4 of `.experts.*.w1.weight`, 5 of `.experts.*.w3.weight`" in message
