"""DoRA's product as one autograd function: as little memory as LoRA's, and no more products.

``y = m / ||W + s B A|| * (W x + s B A x) + bias``, the norm a constant in backward. Written with
torch's operators, four tensors of the size of ``y`` exist at once, and backward keeps one of them
beside ``y``. Here one buffer becomes ``y`` step by step. The gradient of the magnitudes needs
``z = W x + s B A x``. Where ``y`` is the wider side of the layer (gate and up projections, whose
outputs the next operator keeps anyway), ``y`` itself is kept, and ``z = y * ||W + s B A|| / m``.
Elsewhere ``z`` is kept. Computing ``z`` again would cost one more product with the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Elements of an output and its gradient whose products exist at once."""


@dataclass(frozen=True)
class DoraBase:
    """The frozen matrix of one layer, as a product needs it.

    Attributes:
        stored: what is kept for backward: packed tensors, or the weight itself.
        matrix: makes ``(out_features, in_features)`` in a dtype from ``stored``.
        bias: ``(out_features,)``, frozen, or None.
        row_norms: of the matrix, ``(out_features,)``, fp32.
    """

    stored: tuple[Tensor, ...]
    matrix: Callable[[tuple[Tensor, ...], torch.dtype], Tensor]
    bias: Tensor | None
    row_norms: Tensor


def dora_product(
    x: Tensor,
    rest: Tensor | None,
    base: DoraBase,
    low_rank: tuple[Tensor, Tensor],
    magnitude: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """Returns ``m / ||W + s B A|| * (W x + s B A x) + W rest + bias``.

    The base is dequantized once in forward and once in backward.

    Args:
        x: ``(tokens, in_features)``, in the dtype of the product.
        rest: of the same shape and dtype, what only the base sees, or None.
        base: the frozen matrix.
        low_rank: A ``(rank, in_features)`` and B ``(out_features, rank)``, in the dtype of ``x``.
        magnitude: ``m``, ``(out_features,)``, fp32.
        scaling: ``s``.
    """
    return _DoraProduct.apply(x, rest, *low_rank, magnitude, base, scaling, *base.stored)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def row_norms(
    base_norms: Tensor, base_times_a: Tensor, a: Tensor, b: Tensor, *, scaling: float
) -> Tensor:
    """Returns the row norms of ``W + s B A``, ``(out_features,)``, fp32.

    Args:
        base_norms: row norms of ``W``, ``(out_features,)``, fp32.
        base_times_a: ``W A^T``, ``(out_features, rank)``.
        a: A as the forward uses it.
        b: B as the forward uses it.
        scaling: ``s``.
    """
    a, b = a.float(), b.float()
    cross = (b * base_times_a.float()).sum(dim=1)
    own = ((b @ (a @ a.T)) * b).sum(dim=1)
    square = base_norms.square() + 2 * scaling * cross + scaling**2 * own
    # A row of zeros has no direction: its magnitude is zero as well, and 0 / tiny is 0.
    return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


class _DoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        rest: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        base: DoraBase,
        scaling: float,
        *stored: Tensor,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = base.matrix(stored, x.dtype)
            low = x @ a.T
            norms = row_norms(base.row_norms, weight @ a.T, a, b, scaling=scaling)
            product = (x @ weight.T).addmm_(low, b.T, alpha=scaling)
            plain = rest is None and base.bias is None
            ctx.keeps_output = plain and weight.shape[0] > weight.shape[1]
            output = product if ctx.keeps_output else torch.empty_like(product)
            scale_columns(product, magnitude / norms, out=output)
            kept = output if ctx.keeps_output else product
            if rest is not None:
                output.addmm_(rest, weight.T)
            if base.bias is not None:
                output += base.bias
        ctx.matrix, ctx.scaling, ctx.version = base.matrix, scaling, output._version
        ctx.save_for_backward(x, a, b, magnitude, norms, low, kept, *stored)
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, a, b, magnitude, norms, low, kept, *stored = ctx.saved_tensors
        if ctx.keeps_output and kept._version != ctx.version:
            # Hooks of checkpointing hide this from autograd's own check.
            raise RuntimeError("the output of a DoRA layer was changed in place before backward")
        dtype = grad_output.dtype
        # A magnitude of zero has a row of zeros in W and, since nothing reaches it, in B.
        by = magnitude.where(magnitude != 0, torch.inf) if ctx.keeps_output else norms
        grad_magnitude = column_products(grad_output, kept) / by
        by_product = torch.empty_like(grad_output)
        scale_columns(grad_output, magnitude / norms, out=by_product)
        grad_b = (by_product.T @ low) * ctx.scaling
        grad_low = (by_product @ b) * ctx.scaling
        grad_a = grad_low.T @ x
        needs_x, needs_rest, *_ = ctx.needs_input_grad
        grad_x: Tensor | None = None
        grad_rest: Tensor | None = None
        if needs_x or needs_rest:
            weight: Tensor = ctx.matrix(tuple(stored), dtype)
            grad_x = (by_product @ weight).addmm_(grad_low, a) if needs_x else None
            grad_rest = grad_output @ weight if needs_rest else None
        frozen = (None,) * (2 + len(stored))
        return (grad_x, grad_rest, grad_a, grad_b, grad_magnitude, *frozen)


def scale_columns(product: Tensor, factors: Tensor, *, out: Tensor) -> None:
    """Writes ``product`` with each column times its factor.

    As ``z + z * (factor - 1)``: factors are close to 1, and bf16 has none between 1 and 1.0078.

    Args:
        product: ``(tokens, features)``.
        factors: ``(features,)``, fp32.
        out: of the shape and dtype of ``product``; may be ``product`` itself.
    """
    change = (factors - 1.0).to(product.dtype)
    torch.addcmul(product, product, change, out=out)


def column_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns the dot product of each column of ``left`` with that of ``right``, summed in fp32.

    Memory: `CHUNK_ELEMENTS` in their dtype.

    Args:
        left: ``(tokens, features)``.
        right: of the same shape.
    """
    total = torch.zeros(left.shape[1], dtype=torch.float32, device=left.device)
    rows = max(1, CHUNK_ELEMENTS // left.shape[1])
    for one, other in zip(left.split(rows), right.split(rows), strict=True):
        total += (one * other).sum(dim=0, dtype=torch.float32)
    return total
