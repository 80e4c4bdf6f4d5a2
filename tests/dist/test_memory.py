"""Nobody holds the model: resident shards, loading, and what backward keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.alive import alive_tensors
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import random_rows, save_tiny_llama
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdpq.data.dealing.collate import build_step
from fsdpq.dist import own_shard, shard_range
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.worker.bench.allocations import Allocations


def measure_loading(directory: Path, double_quant: bool) -> dict[str, Any]:
    """Loads the model; returns resident and peak bytes of this rank and what they are made of."""
    quantization = {"kind": "bnb", "double_quant": double_quant}
    with Allocations() as tracker:
        assembled = assemble(directory, quantization=quantization)
    frozen = [p for p in assembled.model.parameters() if not p.requires_grad]
    return {
        "resident": assembled.own_bytes(trainable=False),
        "adapter": assembled.own_bytes(trainable=True),
        "total": sum(p.numel() * p.element_size() for p in frozen),
        "one_row_each": sum(_row_bytes(p) for p in frozen),
        "largest_slice": max(_slice_bytes(module) for module in assembled.model.modules()),
        "peak": tracker.peak_bytes,
    }


def _row_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() // parameter.shape[0] * parameter.element_size()


def _slice_bytes(module: nn.Module) -> int:
    """Bytes of this rank's rows of a matrix, in fp32, before quantization."""
    if isinstance(module, QuantizedLinear):
        start, stop = shard_range(module.out_features, dist.get_rank(), dist.get_world_size())
        return (stop - start) * module.in_features * 4
    own = [own_shard(p).rows.nbytes for p in module.parameters(recurse=False)]
    return max(own, default=0)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_no_rank_holds_more_than_its_share(
    ranks: RankPool, tmp_path: Path, num_ranks: int, double_quant: bool
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 2048}
    directory = save_tiny_llama(tmp_path, **wide)
    for answer in ranks.run(num_ranks, measure_loading, directory, double_quant):
        assert answer["resident"] <= answer["total"] / num_ranks + answer["one_row_each"]
        shards = answer["resident"] + answer["adapter"]
        assert answer["peak"] <= shards + 1.5 * answer["largest_slice"]
        # The tracker sees the shards themselves, so a peak below them would mean that it is blind.
        assert answer["peak"] >= shards


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collects every tensor that autograd saves."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def shapes_kept_by_backward(directory: Path) -> dict[str, Any]:
    """Returns the floating-point shapes saved by a forward without checkpointing."""
    assembled = assemble(directory, fsdp={"activation_checkpointing": "none"})
    [batch] = build_step(random_rows(2), micro_batch_size=2, rank=0, world_size=1).micro_batches
    with saved_tensors() as kept:
        loss = assembled.model(batch.input_ids, batch.loss_positions, batch.targets)
    weights = {
        (module.out_features, module.in_features)
        for module in assembled.model.modules()
        if isinstance(module, QuantizedLinear)
    }
    # Tensors that a Function keeps on its own, past the hooks, are found by the garbage collector.
    alive = [t for t in alive_tensors() if not isinstance(t, DTensor)]
    shapes = {tuple(t.shape) for t in (*kept, *alive) if t.is_floating_point()}
    loss.backward()
    return {
        "weights": weights | {shape[::-1] for shape in weights},
        "kept": shapes,
        "packed": sum(t.dtype == torch.uint8 for t in kept),
    }


def test_backward_keeps_no_dequantized_weight(ranks: RankPool, tmp_path: Path) -> None:
    answer = ranks.run(1, shapes_kept_by_backward, save_tiny_llama(tmp_path))[0]
    # Packed Parameters outlive the step: autograd saves none of them, or checkpointed layers would
    # be computed again to their end.
    assert answer["packed"] == 0
    assert not answer["weights"] & answer["kept"]


def times_dequantized(directory: Path, adapter: dict[str, Any]) -> dict[str, int]:
    """Returns how often a training pass with checkpointed layers dequantizes each linear."""
    assembled = assemble(directory, adapter=adapter)
    names = {id(module): name for name, module in assembled.model.named_modules()}
    times = dict.fromkeys(assembled.adapted_layers, 0)
    dequantize = QuantizedLinear.dequantize

    def count(layer: QuantizedLinear, *arguments: Any) -> Tensor:
        times[names[id(layer)].removeprefix("hf.").removesuffix(".base")] += 1
        return dequantize(layer, *arguments)

    [batch] = build_step(random_rows(2), micro_batch_size=2, rank=0, world_size=1).micro_batches
    with mock.patch.object(QuantizedLinear, "dequantize", count):
        assembled.model(batch.input_ids, batch.loss_positions, batch.targets).backward()
    return times


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_checkpointed_layer_does_not_compute_its_last_product_again(
    ranks: RankPool, tmp_path: Path, dropout: float
) -> None:
    adapter = {"rank": 4, "alpha": 8.0, "dropout": dropout}
    times = ranks.run(1, times_dequantized, save_tiny_llama(tmp_path), adapter)[0]
    assert len(times) == 3 * 7
    for name, count in times.items():
        # Forward, forward again, and backward; but nothing trained lies before the first q, k, v.
        first = name.endswith(
            ("layers.0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")
        )
        assert count == (2 if first or name.endswith("down_proj") else 3), name


def own_types(directory: Path, sections: dict[str, dict[str, Any]]) -> tuple[set[bool], set[bool]]:
    """Returns whether FSDP holds the frozen, and the trained parameters."""
    assembled = assemble(directory, **sections)
    frozen, trained = (
        {isinstance(p, DTensor) for p in assembled.model.parameters() if p.requires_grad == wanted}
        for wanted in (False, True)
    )
    return frozen, trained


def test_fsdp_copies_nothing_that_a_rank_has_whole_and_that_is_not_reduced_or_cast(
    ranks: RankPool, tmp_path: Path
) -> None:
    untied = save_tiny_llama(tmp_path / "untied", tied=False)
    assert ranks.run(1, own_types, untied, {}) == [({False}, {False})]
    cast = {"model": {"dtype": "bf16"}, "fsdp": {"precision": {"param": "bf16"}}}
    assert ranks.run(1, own_types, untied, cast) == [({False}, {True})]
    saved = {"adapter": {"rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head"]}}
    assert ranks.run(1, own_types, untied, saved) == [({False}, {True})]
    ddp = {"fsdp": {"strategy": "ddp"}}
    assert ranks.run(2, own_types, untied, ddp) == [({False}, {True})] * 2
    offloaded = {"fsdp": {"offload": "cpu"}}
    assert ranks.run(1, own_types, untied, offloaded) == [({True}, {True})]
    assert ranks.run(2, own_types, untied, {}) == [({True}, {True})] * 2
