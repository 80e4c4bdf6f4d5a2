"""Cross entropy of a frozen linear head, without ever holding all logits.

The gradient for the hidden states is computed in forward, chunk by chunk, while a chunk's logits
exist: two matrix products a token, and memory for one chunk of logits only.

torch's own ``linear_cross_entropy(options=LinearCrossEntropyOptions())`` does the same, but as of
torch 2.13 it returns the sum in the input's dtype, which in bf16 is off by 3% for 300 tokens, and
its default chunks are a few rows, 5 to 8 times slower on a CPU (docs/developing/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_CHUNK_LOGITS = 1 << 25
"""Logits that exist at once. A chunk needs about 10 bytes for each, in bf16 and fp32 together."""


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
        rows = max(1, MAX_CHUNK_LOGITS // weight.shape[0])
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else hidden.new_empty(0)
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
            if needs_gradient:
                by_logit = logits.sub_(log_sum).exp_()  # softmax
                by_logit.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
                if capped is not None:
                    by_logit *= 1.0 - capped.square_()
                gradient[chunk] = by_logit.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Returns the sum of the token losses in nats, an fp32 scalar.

    Memory: about 10 bytes (14 with ``softcap``) for each of at most `MAX_CHUNK_LOGITS` logits, and
    one more ``hidden``.

    Args:
        hidden: ``(num_targets, hidden)``.
        weight: frozen, ``(vocabulary, hidden)``; gets no gradient.
        bias: frozen, ``(vocabulary,)`` or None.
        targets: token ids, ``(num_targets,)``, int64.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as Gemma 2 has it.
    """
    return _ChunkedLoss.apply(hidden, weight, bias, targets, softcap)  # pyright: ignore[reportReturnType]
