"""The product with a quantized matrix as one operator, which ``torch.compile`` leaves whole.

`fsdpq.model.quantized_linear` dequantizes in forward and again in backward, so that nothing but
packed Parameters is kept, whose gathered bytes FSDP frees. A compiler that sees inside finds one
expression twice and keeps its result halfway, 4-bit codes unpacked to bytes: unsharded, for every
layer, until backward (torch 2.13, docs/developing/log.md). It also cannot follow the libraries'
Python (https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html).

An operator takes tensors and numbers only. What it needs to know beyond its tensors stands in a
table, one entry for all matrices of one shape, so that layers that are alike share one compiled
graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fsdpq.protocols import Quantizer


@dataclass(frozen=True)
class Unpacking:
    """How packed tensors become a matrix.

    Attributes:
        quantizer: packed them; compared by identity.
        names: of the packed tensors, in order.
        shape: ``(out_features, in_features)``.
    """

    quantizer: Quantizer
    names: tuple[str, ...]
    shape: tuple[int, int]

    def dequantize(self, packed: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the ``(out_features, in_features)`` matrix from whole packed tensors."""
        named = dict(zip(self.names, packed, strict=True))
        return self.quantizer.dequantize(named, self.shape, dtype)


_TABLE: list[Unpacking] = []


def find_unpacking(unpacking: Unpacking) -> int:
    """Returns the place of ``unpacking`` in the table, where it is put if it is new."""
    if unpacking not in _TABLE:
        _TABLE.append(unpacking)
    return _TABLE.index(unpacking)


@torch.library.custom_op("fsdpq::dequantized_product", mutates_args=())
def compiled_product(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, unpacking: int
) -> Tensor:
    """Returns ``x @ dequantize(packed).T + bias``; only ``x`` gets a gradient.

    Args:
        x: ``(..., in_features)``, in the dtype of the product.
        packed: the whole packed tensors, all that backward keeps.
        bias: ``(out_features,)`` in that dtype, frozen, or None.
        unpacking: from `find_unpacking`.
    """
    return functional.linear(x, _TABLE[unpacking].dequantize(packed, x.dtype), bias)


@torch.library.custom_op("fsdpq::dequantized_product_backward", mutates_args=())
def _backward_product(gradient: Tensor, packed: list[Tensor], unpacking: int) -> Tensor:
    return gradient @ _TABLE[unpacking].dequantize(packed, gradient.dtype)


@compiled_product.register_fake
def _product_shape(x: Tensor, packed: list[Tensor], bias: Tensor | None, unpacking: int) -> Tensor:
    del packed, bias
    return x.new_empty((*x.shape[:-1], _TABLE[unpacking].shape[0]))


@_backward_product.register_fake
def _backward_shape(gradient: Tensor, packed: list[Tensor], unpacking: int) -> Tensor:
    del packed
    return gradient.new_empty((*gradient.shape[:-1], _TABLE[unpacking].shape[1]))


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, packed, _, ctx.unpacking = inputs
    ctx.save_for_backward(*packed)


def _propagate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed = list(ctx.saved_tensors)
    by_input = _backward_product(gradient, packed, ctx.unpacking)
    return by_input, [None] * len(packed), None, None


compiled_product.register_autograd(_propagate, setup_context=_keep_packed)
