"""How likely given tokens are, for tasks that compare answers; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fsdpq.model.chunked_loss import rows_per_chunk


@torch.no_grad()
def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Returns the log-probability of each target, and 1 where it is the likeliest token, else 0.

    Memory: the logits of one chunk of positions (`fsdpq.model.chunked_loss`).

    Args:
        hidden: ``(num_targets, hidden)``, before the head.
        weight: of the head, ``(vocabulary, hidden)``.
        bias: of the head, ``(vocabulary,)`` or None.
        targets: token ids, ``(num_targets,)``, int64.
        softcap: logits are ``softcap * tanh(logits / softcap)``.

    Returns:
        ``(num_targets, 2)``, fp32.
    """
    rows = rows_per_chunk(weight)
    scores = torch.empty(len(targets), 2, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        logits = functional.linear(hidden[chunk], weight, bias).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        wanted = logits.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
        scores[chunk, 0] = wanted - logits.logsumexp(dim=-1)
        scores[chunk, 1] = (logits.argmax(dim=-1) == targets[chunk]).float()
    return scores
