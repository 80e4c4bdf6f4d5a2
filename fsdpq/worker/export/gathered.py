"""Whole tensors of the base of a sharded model, dequantized, for whoever reads them on rank 0.

Which tensor is next is known to the reader alone, so rank 0 says it and all ranks gather it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fsdpq.dist import broadcast_from_first, gather_whole, rank
from fsdpq.model.loading.targets import full_shape, loading_targets
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.export.streamed import Read

T = TypeVar("T")

NO_MORE = -1


class GatheredBase:
    """The base of a sharded model, tensor by tensor.

    Args:
        assembled: the model.
        dtype: that packed matrices are dequantized to, as forward does; others stay in theirs.
        device: packed matrices are dequantized there.

    Attributes:
        device: as given; may be set to another one.
        names: all tensors, by their names in transformers.
    """

    def __init__(self, assembled: Assembled, *, dtype: torch.dtype, device: torch.device) -> None:
        self._targets = loading_targets(assembled.model)
        self._dtype = dtype
        self.device = device
        self.names = list(self._targets)

    def is_packed(self, name: str) -> bool:
        """Whether the tensor is quantized."""
        return isinstance(self._targets[name], PackedMatrix)

    def whole(self, name: str) -> Tensor:
        """Returns a tensor of the base.

        Ranks: all, with the same name (collective).
        Memory: the tensor; of a packed one its bytes on every rank.
        """
        target = self._targets[name]
        if not isinstance(target, PackedMatrix):
            return gather_whole(target)
        gathered = [gather_whole(each) for each in target.packed]
        if rank() != 0:
            return torch.empty(0)
        packed = [each.to(self.device) for each in gathered]
        named = dict(zip(target.packed_names, packed, strict=True))
        shape = (target.out_features, target.in_features)
        matrix = target.quantizer.dequantize(named, shape, self._dtype)
        return matrix.reshape(full_shape(target))


def read_on_first_rank(base: GatheredBase, use: Callable[[Read], T]) -> T | None:
    """Runs ``use`` on rank 0 with what reads the base's tensors; the other ranks take part.

    Ranks: all (collective).

    Returns:
        What ``use`` returned, on rank 0.
    """
    if rank() != 0:
        while (index := _next_index()) != NO_MORE:
            base.whole(base.names[index])
        return None
    indices = {name: index for index, name in enumerate(base.names)}

    def read(name: str) -> Tensor:
        _next_index(indices[name])
        return base.whole(name)

    try:
        return use(read)
    finally:
        _next_index(NO_MORE)


def _next_index(index: int = NO_MORE) -> int:
    """Returns the index that rank 0 gives."""
    told = torch.tensor(index)
    broadcast_from_first(told)
    return int(told)
