"""Cross entropy of a linear head, without ever holding all logits.

Gradients are computed in forward, chunk by chunk, while a chunk's logits exist: two matrix products
a token for a frozen head, three for a trained one, and memory for one chunk of logits only. The
gradient of a trained head is summed over the chunks in fp32.

torch's own ``linear_cross_entropy(options=LinearCrossEntropyOptions())`` does the same, but as of
torch 2.13 it returns the sum in the input's dtype, which in bf16 is off by 3% for 300 tokens, and
its default chunks are a few rows, 5 to 8 times slower on a CPU (docs/developing/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_CHUNK_LOGITS = 1 << 25
"""Logits that exist at once. A chunk needs about 8 bytes for each."""

MAX_CHUNK_LOGITS_CPU = 1 << 23
"""The same on a CPU, where chunks of the size of its caches are faster (docs/developing/log.md)."""


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
    ) -> Tensor:
        rows = rows_per_chunk(weight)
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            index = targets[chunk].unsqueeze(1)
            logits = functional.linear(hidden[chunk], weight, bias).float()
            capped: Tensor | None = None
            if softcap is not None:
                capped = logits.div_(softcap).tanh_()
                logits = capped * softcap
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, index)).sum()
            if any(ctx.needs_input_grad):
                by_logit = logits.sub_(log_sum).exp_()  # softmax
                by_logit.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
                if capped is not None:
                    by_logit *= 1.0 - capped.square_()
                gradients.add(chunk, by_logit, hidden[chunk], weight)
                del by_logit
            del logits, capped  # or they would live beside the next chunk's
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad_output.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def rows_per_chunk(weight: Tensor) -> int:
    """Returns how many positions have logits at once for a head ``(vocabulary, hidden)``."""
    on_cpu = weight.device.type == "cpu"
    most = min(MAX_CHUNK_LOGITS, MAX_CHUNK_LOGITS_CPU) if on_cpu else MAX_CHUNK_LOGITS
    return max(1, most // weight.shape[0])


class _Gradients:
    """Sums of the gradients over the chunks; None where none is needed.

    Args:
        needed: whether hidden states, weight and bias need one.
        hidden: ``(num_targets, hidden)``.
        weight: ``(vocabulary, hidden)``.
    """

    def __init__(self, needed: Sequence[bool], hidden: Tensor, weight: Tensor) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        bias = weight.new_zeros(weight.shape[0], dtype=torch.float32)
        self.bias = bias if needed[2] else None

    def add(self, chunk: slice, by_logit: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds a chunk, given the gradient by its logits, fp32."""
        rounded = by_logit.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = rounded @ weight
        if self.weight is not None:
            self.weight += rounded.T @ hidden
        if self.bias is not None:
            self.bias += by_logit.sum(dim=0)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Returns the sum of the token losses in nats, an fp32 scalar.

    Memory: about 8 bytes (12 with ``softcap``) for each of at most `MAX_CHUNK_LOGITS` logits, one
    more ``hidden``, and for a trained head its gradient in fp32.

    Args:
        hidden: ``(num_targets, hidden)``.
        weight: ``(vocabulary, hidden)``, frozen or trained.
        bias: ``(vocabulary,)`` or None, frozen or trained.
        targets: token ids, ``(num_targets,)``, int64.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as Gemma 2 has it.
    """
    return _ChunkedLoss.apply(hidden, weight, bias, targets, softcap)  # pyright: ignore[reportReturnType]
