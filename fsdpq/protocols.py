"""What the components of the worker half look like to each other.

Components never import one another; `fsdpq.worker` builds them through the registry and passes
them on under these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fsdpq.dist import Shard

BASE = "base"
"""Attribute under which an adapter keeps the layer that it wraps."""

RowReader = Callable[[int, int], Tensor]
"""``read(start, stop)`` returns rows ``[start, stop)`` of one checkpoint matrix, with shape
``(stop - start, in_features)``, in ``model.dtype`` on the rank's device."""


class Quantizer(Protocol):
    """Packs the matrices of frozen linear layers into sharded byte tensors, and back."""

    modules_to_not_convert: tuple[str, ...]

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the byte tensors of one ``(out_features, in_features)`` matrix.

        Empty when the matrix stays as it is.
        """
        ...

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """Fills this rank's shards of one matrix, bit-identical to the whole tensor's result.

        Ranks: all (collective).

        Args:
            read: reads rows of the matrix.
            shape: ``(out_features, in_features)``.
            shards: one `Shard` per name of `packed_shapes`.
        """
        ...

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the whole matrix with shape ``shape`` from whole byte tensors."""
        ...

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns rows ``[start, stop)`` of what `dequantize` returns: one expert of a stack."""
        ...


class Adapter(Protocol):
    """Adds trainable parameters to a model whose base is frozen."""

    def apply_adapter(
        self, model: nn.Module, *, is_target: Callable[[str, nn.Module], bool]
    ) -> int:
        """Wraps the target linear layers in place; returns how many."""
        ...

    def init_adapter(self, model: nn.Module, *, seed: int) -> str:
        """Fills this rank's rows of the adapter; returns a hash of the whole adapter.

        The values depend on ``seed`` and the parameter's name, not on rank or world size.
        """
        ...


class MetricSink(Protocol):
    """Takes rows of metrics on rank 0."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row; must not raise for reasons outside this machine."""
        ...
