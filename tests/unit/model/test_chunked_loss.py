"""The chunked loss equals cross entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fsdpq.model import chunked_loss


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradient_equal_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, with_bias: bool, softcap: float | None
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 16, dtype=torch.float32, requires_grad=True)
    weight, bias = torch.randn(50, 16), torch.randn(50) if with_bias else None
    targets = torch.randint(0, 50, (10,))
    logits = functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    [gradient] = torch.autograd.grad(expected * 0.5, hidden)
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", rows_per_chunk * 50)
    loss = chunked_loss.chunked_cross_entropy(hidden, weight, bias, targets, softcap=softcap)
    [ours] = torch.autograd.grad(loss * 0.5, hidden)
    # fp32, sums in another order.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_trained_head_gets_its_gradients(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(10, 16, requires_grad=True),
        torch.randn(50, 16, requires_grad=True),
    )
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    targets = torch.randint(0, 50, (10,))
    logits = functional.linear(hidden, weight, bias)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    gradients = torch.autograd.grad(expected * 0.5, inputs)
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", rows_per_chunk * 50)
    loss = chunked_loss.chunked_cross_entropy(hidden, weight, bias, targets)
    for ours, gradient in zip(torch.autograd.grad(loss * 0.5, inputs), gradients, strict=True):
        # fp32, sums in another order.
        assert torch.allclose(ours, gradient, rtol=1e-5, atol=1e-6)


def test_chunks_of_a_bf16_heads_gradient_are_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(2000, 8).bfloat16(), torch.zeros(2000, dtype=torch.long)
    weight = (torch.randn(40, 8) / 10).bfloat16().requires_grad_()
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", 40)
    loss = chunked_loss.chunked_cross_entropy(hidden, weight, None, targets)
    [ours] = torch.autograd.grad(loss, weight)
    plain = weight.detach().float().requires_grad_()
    exact = functional.cross_entropy(hidden.float() @ plain.T, targets, reduction="sum")
    [gradient] = torch.autograd.grad(exact, plain)
    assert ours.dtype == torch.bfloat16
    # Each of 2000 products is rounded to bf16 once; a sum in bf16 would be off by whole percents.
    error = (ours.float() - gradient).norm() / gradient.norm()
    assert error < 4e-3


def test_the_sum_stays_exact_in_bf16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 8).bfloat16()
    weight = torch.randn(40, 8).bfloat16()
    targets = torch.randint(0, 40, (3000,))
    loss = chunked_loss.chunked_cross_entropy(hidden, weight, None, targets)
    expected = functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_more_than_one_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", 4 * 50)
    seen: list[int] = []
    linear = functional.linear

    def spy(*arguments: torch.Tensor) -> torch.Tensor:
        product = linear(*arguments)
        seen.append(product.numel())
        return product

    monkeypatch.setattr(chunked_loss.functional, "linear", spy)
    hidden, targets = torch.randn(10, 16), torch.randint(0, 50, (10,))
    chunked_loss.chunked_cross_entropy(hidden, torch.randn(50, 16), None, targets)
    assert seen == [200, 200, 100]
