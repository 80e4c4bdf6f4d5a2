"""A frozen linear layer whose weight lives as packed bytes.

The bytes are ordinary uint8 Parameters, so plain ``fully_shard`` shards and gathers them like any
other weight (torch >= 2.12, https://github.com/pytorch/pytorch/pull/177844). They are never stored
as bf16 or fp16: CUDA copy kernels rewrite NaN bit patterns of those
(https://github.com/pytorch/pytorch/issues/159333).

The dequantized matrix lives for one product only: forward makes it, backward makes it again, and
autograd keeps nothing but the packed Parameters, so memory is linear in the sequence length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.protocols import Quantizer


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a product of ``x`` is computed in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _DequantizedProduct(torch.autograd.Function):
    """``x @ dequantize(packed).T + bias``, with gradients for ``x`` only.

    Autocast does not reach into a Function's backward, so nothing here relies on it: ``x`` and
    ``bias`` come in the dtype of the product.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None, *packed: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*packed)
        return functional.linear(x, layer.dequantize(packed, x.dtype), bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        packed: tuple[Tensor, ...] = ctx.saved_tensors
        weight = ctx.layer.dequantize(packed, grad_output.dtype)
        return (grad_output @ weight, None, None, *(None for _ in packed))


class QuantizedLinear(nn.Module):
    """Stands in for a frozen ``nn.Linear``; made on meta and filled by the streaming loader.

    Args:
        linear: the layer it replaces; its bias, if any, is kept and frozen.
        quantizer: packs and unpacks the weight.

    Attributes:
        packed_names: names of the packed Parameters, uint8, frozen, with the shapes of
            `fsdpq.protocols.Quantizer.packed_shapes`.
    """

    def __init__(self, linear: nn.Linear, *, quantizer: Quantizer) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.quantizer = quantizer
        shapes = quantizer.packed_shapes(self.out_features, self.in_features)
        self.packed_names = tuple(shapes)
        for name, shape in shapes.items():
            packed = torch.empty(shape, dtype=torch.uint8, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def dequantize(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns the ``(out_features, in_features)`` weight from whole packed tensors."""
        named = dict(zip(self.packed_names, packed, strict=True))
        return self.quantizer.dequantize(named, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in `compute_dtype` of ``x``."""
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, without the bias."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        packed = [getattr(self, name) for name in self.packed_names]
        return _DequantizedProduct.apply(x, self, bias, *packed)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Returns the shape, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def packed_parameter_ids(model: nn.Module) -> set[int]:
    """Returns ``id()`` of every packed Parameter in ``model``."""
    return {
        id(getattr(module, name))
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        for name in module.packed_names
    }
