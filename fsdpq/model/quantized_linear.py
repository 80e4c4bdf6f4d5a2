"""A frozen linear layer whose weight lives as packed bytes.

The bytes are ordinary uint8 Parameters, so plain ``fully_shard`` shards and gathers them like any
other weight (torch >= 2.12, https://github.com/pytorch/pytorch/pull/177844). They are never stored
as bf16 or fp16: CUDA copy kernels rewrite NaN bit patterns of those
(https://github.com/pytorch/pytorch/issues/159333).

The dequantized matrix lives for one product only: forward makes it, backward makes it again, and
autograd keeps nothing but the packed Parameters, so memory is linear in the sequence length.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.model.compiled_product import Unpacking, compiled_product, find_unpacking
from fsdpq.protocols import Quantizer, compute_dtype


class Dequantizer(Protocol):
    """Makes the matrix of one product."""

    def dequantize(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns the ``(out_features, in_features)`` matrix from whole packed tensors."""
        ...


class _DequantizedProduct(torch.autograd.Function):
    """``x @ dequantize(packed).T``, added to a tensor if one is given; with a gradient for ``x``.

    Nothing goes through ``save_for_backward``. The packed tensors are Parameters, which outlive the
    step, and FSDP has gathered them by the time of backward. And a checkpointed layer is computed
    again only up to the last tensor that it saves: its last product is not done a third time.

    Autocast does not reach into a Function's backward, so nothing here relies on it: ``x`` and
    ``addend`` come in the dtype of the product.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, layer: Dequantizer, addend: Tensor | None, *packed: Tensor
    ) -> Tensor:
        ctx.layer, ctx.packed = layer, packed
        weight = layer.dequantize(packed, x.dtype)
        if addend is None:
            return functional.linear(x, weight)
        ctx.mark_dirty(addend)
        return addend.addmm_(x, weight.T)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_addend, *_ = ctx.needs_input_grad
        grad_x: Tensor | None = None
        if needs_x:
            grad_x = grad_output @ ctx.layer.dequantize(ctx.packed, grad_output.dtype)
        return (grad_x, None, grad_output if needs_addend else None, *(None for _ in ctx.packed))


def dequantized_product(
    x: Tensor, layer: Dequantizer, bias: Tensor | None, packed: tuple[Tensor, ...]
) -> Tensor:
    """Returns ``x @ layer.dequantize(packed).T + bias``; only ``x`` gets a gradient.

    Args:
        x: ``(..., in_features)``; the product is computed in its `compute_dtype`.
        layer: dequantizes, once in forward and once in backward.
        bias: ``(out_features,)``, frozen, or None.
        packed: the whole packed tensors, all that backward keeps.
    """
    dtype = compute_dtype(x)
    product = _DequantizedProduct.apply(x.to(dtype), layer, None, *packed)
    return product if bias is None else product + bias.to(dtype)  # pyright: ignore


class PackedMatrix(nn.Module):
    """A frozen matrix as packed bytes; made on meta and filled by the streaming loader.

    Args:
        out_features: rows of the matrix.
        in_features: its columns.
        quantizer: packs and unpacks it.
        device: of the packed Parameters.

    Attributes:
        packed_names: names of the packed Parameters, uint8, frozen, with the shapes of
            `fsdpq.protocols.Quantizer.packed_shapes`.
        kept: the matrix, where `keep_matrix` made it, else None.
        unpacking: what `fsdpq.model.compiled_product` knows this kind of matrix by.
    """

    def __init__(
        self, out_features: int, in_features: int, *, quantizer: Quantizer, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quantizer = quantizer
        self.kept: Tensor | None = None
        shapes = quantizer.packed_shapes(out_features, in_features)
        self.packed_names = tuple(shapes)
        shape = (out_features, in_features)
        self.unpacking = find_unpacking(Unpacking(quantizer, self.packed_names, shape))
        for name, shape in shapes.items():
            packed = torch.empty(shape, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The packed Parameters, in the order of ``packed_names``."""
        return tuple(getattr(self, name) for name in self.packed_names)

    def dequantize_whole(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns the ``(out_features, in_features)`` matrix from whole packed tensors."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        named = dict(zip(self.packed_names, packed, strict=True))
        return self.quantizer.dequantize(named, (self.out_features, self.in_features), dtype)

    def keep_matrix(self, dtype: torch.dtype) -> int:
        """Dequantizes once instead of for every product in ``dtype``: for answers of few tokens.

        What products give stays the same to the last bit. For a model that is not sharded.

        Returns:
            The bytes that it takes from now on.
        """
        self.kept = self.dequantize_whole(self.packed, dtype)
        return self.kept.nbytes

    def extra_repr(self) -> str:
        """Returns the shape, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantizedLinear(PackedMatrix):
    """Stands in for a frozen ``nn.Linear``.

    Args:
        linear: the layer it replaces; its bias, if any, is kept and frozen.
        quantizer: packs and unpacks the weight.
    """

    def __init__(self, linear: nn.Linear, *, quantizer: Quantizer) -> None:
        super().__init__(
            linear.out_features,
            linear.in_features,
            quantizer=quantizer,
            device=linear.weight.device,
        )
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def dequantize(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns the ``(out_features, in_features)`` weight from whole packed tensors."""
        return self.dequantize_whole(packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in `compute_dtype` of ``x``."""
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, without the bias."""
        return self._product(x, None)

    def add_to(self, addend: Tensor, x: Tensor) -> Tensor:
        """Adds what `forward` gives for ``x`` to ``addend``, in place, and returns it.

        The matrix product adds by itself: no pass over memory of its own, and one rounding.

        Args:
            addend: ``(tokens, out_features)`` in `compute_dtype` of ``x``; saved by no operation.
            x: ``(tokens, in_features)``.
        """
        if torch.compiler.is_compiling():
            return addend + self._product(x, self.bias)
        dtype = compute_dtype(x)
        if self.bias is not None:
            addend = addend.add_(self.bias.to(dtype))
        return _DequantizedProduct.apply(x.to(dtype), self, addend, *self.packed)  # pyright: ignore[reportReturnType]

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return dequantized_product(x, self, bias, self.packed)
        dtype = compute_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        return compiled_product(x.to(dtype), list(self.packed), bias, self.unpacking)


def packed_parameter_ids(model: nn.Module) -> set[int]:
    """Returns ``id()`` of every packed Parameter in ``model``."""
    return {
        id(getattr(module, name))
        for module in model.modules()
        if isinstance(module, PackedMatrix)
        for name in module.packed_names
    }
