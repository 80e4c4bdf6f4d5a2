"""The product of a quantized layer, added to what an adapter gives."""

from __future__ import annotations

import torch
from torch import Tensor

from fsdpq.model.quantized_linear import _DequantizedProduct


class Plain:
    """Dequantizes to a given matrix."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def dequantize(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return self.weight.to(dtype)


def test_gradients_reach_the_input_and_what_is_added() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(5, 6, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    weight, g = torch.randn(4, 6), torch.randn(3, 4)
    expected = torch.autograd.grad((x @ weight.T + a @ g).square().sum(), (x, a))
    product = _DequantizedProduct.apply(x, Plain(weight), a @ g)
    found = torch.autograd.grad(product.square().sum(), (x, a))  # pyright: ignore
    for ours, theirs in zip(found, expected, strict=True):
        # fp32, sums in another order.
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_input_without_gradient_is_not_multiplied_again() -> None:
    a = torch.randn(5, 4, requires_grad=True)
    layer = Plain(torch.randn(4, 6))
    product = _DequantizedProduct.apply(torch.randn(5, 6), layer, a * 1.0)
    layer.weight = torch.full((4, 7), torch.nan)  # would not fit
    [gradient] = torch.autograd.grad(product.sum(), a)  # pyright: ignore
    assert torch.equal(gradient, torch.ones(5, 4))


def test_additions_below_the_rounding_of_bf16_are_not_lost() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(256, 64).bfloat16(), (torch.randn(512, 64) / 8).bfloat16()
    small = torch.full((256, 512), 2e-4).bfloat16()
    base = x @ weight.T
    product = _DequantizedProduct.apply(x, Plain(weight), small.clone())
    # Rounded once, the sum keeps the addition on average over 131,072 numbers of deviation 2^-9:
    # to about 1e-5. Rounded before as well, all but the smallest numbers lose it.
    exact = x.double() @ weight.double().T
    shift = (product.double() - exact).mean().item()  # pyright: ignore
    lost = ((base + small).double() - exact).mean().item()
    assert abs(shift - 2e-4) < 0.3e-4
    assert lost < 1e-4, "this test notices numbers that are rounded twice"
