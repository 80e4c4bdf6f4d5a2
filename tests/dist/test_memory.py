"""Nobody holds the model: resident shards, loading, and what backward keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fsdpq.data.loader import build_step
from fsdpq.dist import own_shard, shard_range
from fsdpq.model.quantized_linear import QuantizedLinear
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import random_rows, save_tiny_llama

LARGE_BYTES = 1 << 16
"""Smaller storages are not looked up in the kernel's table of mappings."""


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of live host tensors that torch operators made, and their peak.

    Views of a memory-mapped file are no allocations: their pages are the page cache's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._add(value)
        return result

    def _add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if storage.device.type != "cpu" or key in self._seen:
            return
        if size > LARGE_BYTES and _is_mapped_file(value.data_ptr()):
            return
        self._seen.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= size


def _is_mapped_file(address: int) -> bool:
    """Whether an address lies in a mapped checkpoint, by the kernel's table (Linux only)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, stop = line.split(maxsplit=1)[0].partition("-")
        if int(start, 16) <= address < int(stop, 16):
            return line.endswith(".safetensors")
    return False


def measure_loading(directory: Path, double_quant: bool) -> dict[str, Any]:
    """Loads the model; returns resident and peak bytes of this rank and what they are made of."""
    quantization = {"kind": "bnb", "double_quant": double_quant}
    with AllocationTracker() as tracker:
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
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
    loss.backward()
    weights = {
        (module.out_features, module.in_features)
        for module in assembled.model.modules()
        if isinstance(module, QuantizedLinear)
    }
    shapes = {tuple(t.shape) for t in kept if t.is_floating_point()}
    return {
        "weights": weights | {shape[::-1] for shape in weights},
        "kept": shapes,
        "packed": sum(t.dtype == torch.uint8 for t in kept),
    }


def test_backward_keeps_no_dequantized_weight(ranks: RankPool, tmp_path: Path) -> None:
    answer = ranks.run(1, shapes_kept_by_backward, save_tiny_llama(tmp_path))[0]
    # Four packed Parameters of seven linears of three layers; the first layer's q, k and v have no
    # trainable parameter before them, so nothing flows through their frozen part.
    assert answer["packed"] == (3 * 7 - 3) * 4
    assert not answer["weights"] & answer["kept"]
