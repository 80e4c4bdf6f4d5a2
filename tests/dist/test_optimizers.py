"""Optimizers over sharded parameters equal their libraries' own over whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from support.ranks import RankPool
from support.tiny import tiny_recipe
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fsdpq.dist import gather_whole
from fsdpq.registry import resolve_builder

NUM_STEPS = 5
# What a rank of 2 or 3 owns of these starts at a multiple of 256 weights.
ALIGNED = {"layers.0.lora_A": (12, 512), "layers.0.lora_B": (96, 64), "layers.0.norm": (33,)}
# 3 ranks own 3, 3 and 1 rows of 7, 2 ranks 4 and 3; of 2 rows one of 3 ranks owns none.
UNEVEN = {
    "layers.0.lora_A": (7, 96), "layers.0.lora_B": (75, 100), "layers.0.tiny": (2, 5),
    "layers.0.norm": (33,), "lm_head.weight": (31, 24),
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def _values(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _train(optimizer: Any, parameters: dict[str, nn.Parameter], shapes: Shapes) -> None:
    """Takes some steps with given gradients; learning rates fall once, as by a schedule."""
    for index in range(NUM_STEPS):
        gradients = _values(shapes, seed=index + 1)
        for name, p in parameters.items():
            whole = gradients[name]
            is_sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if is_sharded else whole
        for group in optimizer.param_groups:
            group["lr"] /= 2 if index == 2 else 1
        optimizer.step()


def sharded_weights(shapes: Shapes, options: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the whole weights after some steps of the recipe's optimizer over shards."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parameters = {
        name: nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        for name, value in _values(shapes, seed=0).items()
    }
    recipe = tiny_recipe(optimizer=options)
    optimizer = resolve_builder("optimizer", recipe.optimizer)(recipe.optimizer, parameters)
    _train(optimizer, parameters, shapes)
    return {name: gather_whole(parameter) for name, parameter in parameters.items()}


def whole_weights(
    shapes: Shapes, build: Callable[[dict[str, nn.Parameter]], list[Any]]
) -> dict[str, Tensor]:
    """Returns the weights after the same steps of a library's optimizers, unsharded."""
    parameters = {name: nn.Parameter(value) for name, value in _values(shapes, seed=0).items()}
    for optimizer in build(parameters):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {name: p for name, p in parameters.items() if id(p) in own}
        _train(optimizer, mine, shapes)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _bitsandbytes(parameters: dict[str, nn.Parameter]) -> list[Any]:
    return [bitsandbytes.optim.AdamW8bit(parameters.values(), lr=1e-2, weight_decay=0.1)]


EIGHT_BITS = {"kind": "adamw_8bit", "lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_8bit_adamw_is_that_of_bitsandbytes_where_shards_begin_at_a_block(
    ranks: RankPool, num_ranks: int
) -> None:
    expected = whole_weights(ALIGNED, _bitsandbytes)
    for answer in ranks.run(num_ranks, sharded_weights, ALIGNED, EIGHT_BITS):
        for name, weights in expected.items():
            assert torch.equal(answer[name], weights), name


def test_8bit_adamw_cuts_other_blocks_elsewhere(ranks: RankPool) -> None:
    expected = whole_weights(UNEVEN, _bitsandbytes)
    start = _values(UNEVEN, seed=0)
    one = ranks.run(1, sharded_weights, UNEVEN, EIGHT_BITS)[0]
    three = ranks.run(3, sharded_weights, UNEVEN, EIGHT_BITS)[0]
    for name, weights in expected.items():
        assert torch.equal(one[name], weights), name
        moved = (weights - start[name]).norm()
        # 8 bits hold a mean to about a hundredth of the largest of its block.
        assert (three[name] - weights).norm() < 0.05 * moved, name
    assert not torch.equal(three["layers.0.lora_B"], one["layers.0.lora_B"])


def _muon(parameters: dict[str, nn.Parameter]) -> list[Any]:
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "layers" not in name]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_muon_is_torchs_own_over_whole_matrices(ranks: RankPool, num_ranks: int) -> None:
    expected = whole_weights(UNEVEN, _muon)
    options = {"kind": "muon", "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    for answer in ranks.run(num_ranks, sharded_weights, UNEVEN, options):
        for name, weights in expected.items():
            # The same bf16 products of the same matrices; fused AdamW rounds its last bit apart.
            assert torch.allclose(answer[name], weights, rtol=1e-6, atol=1e-7), name


class _Adapted(nn.Module):
    """Parameters under the names that PEFT gives them."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "_"), parameter)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_lora_plus_is_pefts(ranks: RankPool, kind: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    classes: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

    def build(parameters: dict[str, nn.Parameter]) -> list[Any]:
        model: Any = _Adapted(parameters)
        return [create_loraplus_optimizer(model, classes[kind], lr=1e-3, loraplus_lr_ratio=16.0)]

    expected = whole_weights(UNEVEN, build)
    options = {"kind": kind, "lr": 1e-3, "lora_plus_ratio": 16.0}
    plain = ranks.run(2, sharded_weights, UNEVEN, {"kind": kind, "lr": 1e-3})[0]
    for answer in ranks.run(2, sharded_weights, UNEVEN, options):
        for name, weights in expected.items():
            # Adam's quotients of sums in fp32, fused or not.
            assert torch.allclose(answer[name], weights, rtol=1e-5, atol=1e-6), name
        assert torch.equal(answer["layers.0.lora_A"], plain["layers.0.lora_A"])
        assert not torch.allclose(answer["layers.0.lora_B"], plain["layers.0.lora_B"], atol=1e-2)
