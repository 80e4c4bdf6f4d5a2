"""No quantization: every linear layer keeps its weight in ``model.dtype``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fsdpq.dist import Shard
from fsdpq.protocols import RowReader
from fsdpq.recipe.sections.quantization import NoQuantOptions


class NoQuantizer:
    """A quantizer that packs nothing, so that no layer is swapped."""

    def __init__(self, options: NoQuantOptions) -> None:  # noqa: ARG002 - every builder takes them
        self.modules_to_not_convert: tuple[str, ...] = ()

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """Returns nothing: the matrix stays as it is."""
        return {}

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """Is never called, as there is nothing packed."""
        raise NotImplementedError("`quantization: none` packs no matrix")

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Is never called, as there is nothing packed."""
        raise NotImplementedError("`quantization: none` packs no matrix")

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Is never called, as there is nothing packed."""
        raise NotImplementedError("`quantization: none` packs no matrix")
