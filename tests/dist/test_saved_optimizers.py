"""Optimizers that go on from a checkpoint on other ranks equal their libraries' own, undisturbed.

Some ranks take the first steps over shards and save; others load and take the rest. The reference
takes all steps over whole parameters in one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from support.ranks import RankPool
from support.tiny import tiny_recipe
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fsdpq.checkpoint.sharded import load_pieces, save_pieces
from fsdpq.checkpoint.storage import CheckpointReader, CheckpointWriter
from fsdpq.dist import gather_whole, new_host_group
from fsdpq.optimizer.saved_state import OptimizerState
from fsdpq.protocols import own_piece
from fsdpq.registry import resolve_builder
from fsdpq.tensor_files.checkpoint_manifest import (
    STATE_NAME,
    SavedCheckpoint,
    check_checkpoint,
    read_document,
    step_directory,
)

SAVED, STEPS = 3, 5
# What a rank of 2 or 3 owns of these starts at a multiple of 256 weights.
ALIGNED = {"layers.0.lora_A": (12, 512), "layers.0.lora_B": (96, 64), "layers.0.norm": (33,)}
# 3 ranks own 3, 3 and 1 rows of 7, 2 ranks 4 and 3; of 2 rows one of 3 ranks owns none.
UNEVEN = {
    "layers.0.lora_A": (7, 96), "layers.0.lora_B": (75, 100), "layers.0.tiny": (2, 5),
    "layers.0.norm": (33,), "lm_head.weight": (31, 24),
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
Build = Callable[[dict[str, nn.Parameter]], list[Any]]


def _values(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _train(
    optimizer: Any, parameters: dict[str, nn.Parameter], shapes: Shapes, first: int, last: int
) -> None:
    """Takes steps with given gradients at a learning rate that falls, as by a schedule."""
    peak = [group["lr"] for group in optimizer.param_groups]
    for index in range(first, last):
        gradients = _values(shapes, seed=index + 1)
        for name, p in parameters.items():
            whole = gradients[name]
            is_sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if is_sharded else whole
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr / (1 + index)
        optimizer.step()


def _describe(files: dict[str, Any]) -> SavedCheckpoint:
    return SavedCheckpoint(SAVED, 0, 1, None, 0.0, {}, "", {}, files)


def sharded_part(
    shapes: Shapes, options: dict[str, Any], folder: Path, first: int, last: int
) -> dict[str, Tensor]:
    """Takes some steps of the recipe's optimizer over shards; returns the whole weights.

    Steps that do not begin at 0 go on from the checkpoint that those before them leave.
    """
    mesh, group = init_device_mesh("cpu", (torch.distributed.get_world_size(),)), new_host_group()
    parameters = {
        name: nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        for name, value in _values(shapes, seed=0).items()
    }
    recipe = tiny_recipe(optimizer=options)
    optimizer = resolve_builder("optimizer", recipe.optimizer)(recipe.optimizer, parameters)
    state = OptimizerState(optimizer, parameters)
    weights = {name: own_piece(parameter) for name, parameter in parameters.items()}
    directory = step_directory(folder, SAVED)
    if first:
        facts = read_document(directory, STATE_NAME)
        reader = CheckpointReader(directory, check_checkpoint(directory))
        load_pieces(reader, weights | state.prepare(facts), group)
        state.finish()
    _train(optimizer, parameters, shapes, first, last)
    if not first:
        writer = CheckpointWriter(directory, json.dumps(state.facts()).encode(), _describe)
        save_pieces(writer, weights | state.pieces(), group)
    return {name: gather_whole(parameter) for name, parameter in parameters.items()}


def whole_weights(shapes: Shapes, build: Build) -> dict[str, Tensor]:
    """Returns the weights after all steps of a library's optimizers, unsharded."""
    parameters = {name: nn.Parameter(value) for name, value in _values(shapes, seed=0).items()}
    for optimizer in build(parameters):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {name: p for name, p in parameters.items() if id(p) in own}
        _train(optimizer, mine, shapes, 0, STEPS)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def interrupted(
    ranks: RankPool, worlds: tuple[int, int], shapes: Shapes, options: dict[str, Any], folder: Path
) -> dict[str, Tensor]:
    """Returns the weights after all steps: some ranks take the first, others the rest."""
    ranks.run(worlds[0], sharded_part, shapes, options, folder, 0, SAVED)
    return ranks.run(worlds[1], sharded_part, shapes, options, folder, SAVED, STEPS)[0]


def _bitsandbytes(parameters: dict[str, nn.Parameter]) -> list[Any]:
    return [bitsandbytes.optim.AdamW8bit(parameters.values(), lr=1e-2, weight_decay=0.1)]


EIGHT_BITS = {"kind": "adamw_8bit", "lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("worlds", [(2, 3), (3, 1), (1, 2)])
def test_8bit_adamw_is_that_of_bitsandbytes_where_shards_begin_at_a_block(
    ranks: RankPool, tmp_path: Path, worlds: tuple[int, int]
) -> None:
    expected = whole_weights(ALIGNED, _bitsandbytes)
    found = interrupted(ranks, worlds, ALIGNED, EIGHT_BITS, tmp_path)
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name


def test_8bit_adamw_rounds_means_again_only_in_blocks_that_are_cut_elsewhere(
    ranks: RankPool, tmp_path: Path
) -> None:
    expected = whole_weights(UNEVEN, _bitsandbytes)
    start = _values(UNEVEN, seed=0)
    found = interrupted(ranks, (1, 3), UNEVEN, EIGHT_BITS, tmp_path)
    for name, weights in expected.items():
        moved = (weights - start[name]).norm()
        # 8 bits hold a mean to about a hundredth of the largest of its block.
        assert (found[name] - weights).norm() < 0.05 * moved, name
    # The first of three ranks begins where one rank begins: its full blocks are the same.
    rows = 25 * 100 // 256 * 256 // 100
    assert torch.equal(found["layers.0.lora_B"][:rows], expected["layers.0.lora_B"][:rows])


def _muon(parameters: dict[str, nn.Parameter]) -> list[Any]:
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "layers" not in name]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)]


LIBRARIES: dict[str, tuple[dict[str, Any], Build]] = {
    "muon": ({"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}, _muon),
    "adamw": ({"lr": 1e-2}, lambda p: [torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=0.01)]),
    "adam": ({"lr": 1e-2}, lambda p: [torch.optim.Adam(p.values(), lr=1e-2, weight_decay=0.01)]),
    "sgd": (
        {"lr": 0.1, "momentum": 0.9},
        lambda p: [torch.optim.SGD(p.values(), lr=0.1, momentum=0.9, weight_decay=0.01)],
    ),
    "adadelta": (
        {"lr": 1.0},
        lambda p: [torch.optim.Adadelta(p.values(), lr=1.0, weight_decay=0.01)],
    ),
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_optimizers_are_torchs_own(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    options, build = LIBRARIES[kind]
    options = {"kind": kind, "weight_decay": 0.01} | options
    expected = whole_weights(UNEVEN, build)
    found = interrupted(ranks, (2, 3), UNEVEN, options, tmp_path)
    for name, weights in expected.items():
        # Quotients of sums in fp32, fused or not.
        assert torch.allclose(found[name], weights, rtol=1e-5, atol=1e-6), name
