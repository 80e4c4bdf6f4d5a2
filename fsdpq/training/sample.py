"""Generates text from a sharded model: every rank computes the same tokens in step."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache

NextTokenLogits = Callable[[Tensor, Cache], Tensor]


@torch.no_grad()
def generate_ids(
    next_token_logits: NextTokenLogits,
    prompt: list[int],
    *,
    cache: Cache,
    max_new_tokens: int,
    stop_ids: Collection[int],
    device: torch.device,
    temperature: float = 0.0,
) -> list[int]:
    """Returns the token ids that follow ``prompt``, without the stop token.

    Ranks: all (collective).

    Args:
        next_token_logits: maps new token ids ``(1, tokens)`` and the cache to ``(1, vocabulary)``.
        prompt: token ids.
        cache: an empty key-value cache.
        max_new_tokens: upper bound of the result's length.
        stop_ids: tokens that end the text.
        device: this rank's device.
        temperature: 0 takes the likeliest token, else logits are divided by it and sampled.
    """
    answer: list[int] = []
    inputs = torch.tensor([prompt], device=device)
    while len(answer) < max_new_tokens:
        logits = next_token_logits(inputs, cache)[0].float()
        if temperature > 0:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
        else:
            token = logits.argmax().reshape(1)
        if dist.is_initialized():
            dist.broadcast(token, src=0)
        if int(token) in stop_ids:
            break
        answer.append(int(token))
        inputs = token.reshape(1, 1)
    return answer
