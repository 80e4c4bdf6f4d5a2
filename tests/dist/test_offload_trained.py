"""Frozen weights in host memory, trained ones on the device: where things are, and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretend_device import Sections, places_in_steps
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama
from torch.distributed.fsdp import FSDPModule

from fsdpq import compat

METHODS: dict[str, Sections] = {
    "lora over hqq": {"quantization": {"kind": "hqq"}},
    "dora": {"adapter": {"kind": "dora", "rank": 4, "alpha": 8.0}, "quantization": {"kind": "hqq"}},
    "lora and a saved head, by sgd": {
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head"]},
        "quantization": {"kind": "none"},
        "optimizer": {"kind": "sgd", "lr": 1e-3, "momentum": 0.9},
    },
    "llama_pro by muon": {
        "adapter": {"kind": "llama_pro", "num_new_layers": 1},
        "quantization": {"kind": "none"},
        "optimizer": {"kind": "muon", "lr": 1e-3},
    },
}

ASKED = [("lora over hqq", True), *((name, False) for name in METHODS)]
"""Methods, and whether what they train is offloaded."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), tied=False)


@pytest.fixture(scope="module")
def places(tiny: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """Where things are in a step on a device that the machine does not have."""
    recipes = [
        METHODS[name]
        | {"fsdp": {"offload": "cpu", "offload_trained": offloaded, "activation_offload": True}}
        for name, offloaded in ASKED
    ]
    ranks = RankPool()
    try:
        answers = ranks.run(1, places_in_steps, tiny, recipes)[0]
    finally:
        ranks.close()
    return dict(zip(ASKED, answers, strict=True))


@pytest.mark.parametrize(("name", "offloaded"), ASKED)
def test_trained_weights_gradients_and_states_stay_together_where_they_belong(
    places: dict[tuple[str, bool], dict[str, Any]], name: str, offloaded: bool
) -> None:
    found, place = places[name, offloaded], "cpu" if offloaded else "pretend"
    assert found["frozen"] == {"cpu"}
    assert found["trained"] == found["gradients"] == found["states"] == {place}
    assert found["norm"] == place
    # Two micro-batches; the last layer's input stays on the device. LLaMA Pro's only trained layer
    # is the last one here, and backward ends there.
    moved = 0 if name.startswith("llama_pro") else 2 * 2
    assert found["activations"] == {"cpu": moved, "pretend": moved}


def train_offloaded(directory: Path, fsdp: dict[str, Any], sections: Sections) -> dict[str, Any]:
    """Trains on this rank; returns losses, norms and what FSDP2 does with its Parameters."""
    assembled = assemble(directory, fsdp={"offload": "cpu"} | fsdp, **sections)
    rows = random_rows(16)
    numbers = train(
        assembled, [rows[:8], rows[8:]], micro_batch_size=2, lr=1e-3, max_norm=1.0,
        no_sync=fsdp.get("no_sync", False),
    )  # fmt: skip
    params = [
        param
        for module in assembled.model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for param in group.fsdp_params
    ]
    return {
        "numbers": numbers,
        "notices": assembled.notices,
        "offloaded": {
            (param.sharded_param.requires_grad, param.offload_to_cpu) for param in params
        },
    }


@pytest.mark.parametrize(
    ("num_ranks", "fsdp", "sections"),
    [
        (1, {}, {}),
        (2, {"no_sync": True}, {}),
        (2, {"strategy": "ddp"}, METHODS["llama_pro by muon"]),
    ],
)
def test_numbers_are_those_of_training_on_the_host(
    ranks: RankPool, tiny: Path, num_ranks: int, fsdp: dict[str, Any], sections: Sections
) -> None:
    host = ranks.run(num_ranks, train_offloaded, tiny, fsdp, sections)
    kept = ranks.run(num_ranks, train_offloaded, tiny, fsdp | {"offload_trained": False}, sections)
    for on_host, on_device in zip(host, kept, strict=True):
        assert on_host["offloaded"] == {(True, True), (False, True)}
        assert on_device["offloaded"] == {(True, False), (False, True)}
        assert on_device["numbers"] == on_host["numbers"]
        assert on_host["notices"] == ()
        assert "`fsdp.offload_trained: false` changes nothing here" in on_device["notices"][0]


def test_private_state_of_fsdp2_is_that_of_the_torch_it_was_read_in() -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    assert version == compat.FSDP_READ_AGAINST, (
        f"torch {version}: read torch/distributed/fsdp/_fully_shard again for "
        "`fsdpq.compat.keep_trained_on_device`: is `offload_to_cpu` still of each Parameter, and has "
        "`fully_shard` a public way now (pytorch#187615)? Then raise `FSDP_READ_AGAINST` or delete it"
    )
