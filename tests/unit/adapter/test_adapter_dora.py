"""One DoRA layer against PEFT's, dropout and bias included."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from fsdpq.adapter.dora import DoraLinear
from fsdpq.adapter.dora_product import row_norms
from fsdpq.recipe.sections.adapter import DoraOptions

OPTIONS = DoraOptions(kind="dora", rank=4, alpha=12.0, dropout=0.4)
CPU = torch.device("cpu")


def _layers(
    dtype: torch.dtype, *, out_features: int = 40, bias: bool = True
) -> tuple[DoraLinear, nn.Module]:
    """Returns our layer and PEFT's with the same weights, away from their initial values."""
    torch.manual_seed(0)
    linear = nn.Linear(48, out_features, bias=bias, dtype=dtype)
    linear.requires_grad_(False)
    if bias:
        linear.bias.mul_(50)  # qwen2's biases are that big
    ours = DoraLinear(linear, OPTIONS)
    ours.init_norms(dtype=dtype, device=CPU)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.4, use_dora=True)
    theirs = PeftLinear(copy.deepcopy(linear), "default", config=config, r=4, lora_alpha=12)
    magnitude = theirs.lora_magnitude_vector["default"]
    assert torch.allclose(ours.magnitude, magnitude.weight.float(), rtol=4e-3)
    nn.init.normal_(ours.lora_A, std=0.2)
    nn.init.normal_(ours.lora_B, std=0.2)
    with torch.no_grad():
        ours.magnitude.mul_(torch.rand_like(ours.magnitude) + 0.5)
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
        magnitude.weight.copy_(ours.magnitude)
    return ours, theirs


def _run(layer: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 48, generator=generator).to(dtype).requires_grad_()
    torch.manual_seed(2)  # dropout
    out = layer(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


# A layer that widens without a bias keeps its output for backward, others what comes before it.
@pytest.mark.parametrize(("out_features", "bias"), [(40, True), (80, True), (80, False)])
def test_output_and_gradients_equal_pefts_with_dropout(out_features: int, bias: bool) -> None:
    ours, theirs = _layers(torch.float32, out_features=out_features, bias=bias)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        ours.zero_grad()
        theirs.zero_grad()
        for mine, other in zip(_run(ours, torch.float32), _run(theirs, torch.float32), strict=True):
            # fp32, and the norm is summed from three terms instead of one.
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        pairs = [
            (ours.lora_A, theirs.lora_A["default"].weight),  # pyright: ignore
            (ours.lora_B, theirs.lora_B["default"].weight),  # pyright: ignore
            (ours.magnitude, theirs.lora_magnitude_vector["default"].weight),  # pyright: ignore
        ]
        for mine, other in pairs:
            assert mine.grad is not None
            bound = 1e-4 * other.grad.abs().max().item()
            assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=bound)


def test_bf16_norm_is_close_to_the_norm_in_fp32() -> None:
    ours, _ = _layers(torch.bfloat16)
    a, b = ours.lora_A.to(torch.bfloat16), ours.lora_B.to(torch.bfloat16)
    base_times_a = nn.functional.linear(ours.base.weight, a)  # pyright: ignore
    norm = row_norms(ours.base_norm, base_times_a, a, b, scaling=ours.scaling)
    whole = ours.base.weight.float() + ours.scaling * (b.float() @ a.float())  # pyright: ignore
    # One factor is rounded to bf16's 8 bits; PEFT rounds the norm itself to them.
    assert torch.allclose(norm, whole.norm(dim=1), rtol=2**-9)


def test_bf16_shows_a_change_of_the_magnitudes_below_its_step_at_one() -> None:
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = DoraLinear(linear, OPTIONS).eval()
    layer.init_norms(dtype=torch.bfloat16, device=CPU)
    nn.init.normal_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer(x).double()
    with torch.no_grad():
        layer.magnitude.mul_(1.003)
    factor = (layer(x).double() * before).sum() / before.square().sum()
    # 1.003 itself is 1 in bf16; thousands of outputs that are rounded up or down average to it.
    assert abs(factor.item() - 1.003) < 3e-4


@pytest.mark.parametrize("out_features", [3, 12])
def test_a_row_of_zeros_stays_finite(out_features: int) -> None:
    linear = nn.Linear(8, out_features, bias=False).requires_grad_(False)
    linear.weight[1] = 0
    layer = DoraLinear(linear, OPTIONS)
    layer.init_norms(dtype=torch.float32, device=CPU)
    nn.init.normal_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)
    out = layer.eval()(torch.ones(2, 8))
    assert out.isfinite().all()
    assert (out[:, 1] == 0).all()
    out.sum().backward()
    for parameter in (layer.lora_A, layer.lora_B, layer.magnitude):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert (layer.lora_B.grad[1] == 0).all()  # pyright: ignore[reportOptionalSubscript]


def test_an_output_changed_in_place_is_no_silent_mistake() -> None:
    layer, _ = _layers(torch.float32, out_features=80, bias=False)
    layer.eval()  # no dropout: the layer keeps its output
    x = torch.randn(2, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):  # autograd's own check
        layer(x).clamp_(-1, 1).sum().backward()
    with pytest.raises(RuntimeError, match="in place"):
        checkpoint(lambda x: layer(x).clamp_(-1, 1).exp(), x, use_reentrant=False).sum().backward()
    narrow, _ = _layers(torch.float32)
    narrow(x).clamp_(-1, 1).sum().backward()
