"""Generates text from a model, sharded or whole: every rank computes the same tokens in step.

What is done to the logits is done by transformers' own processors, in the order of its
``generate``: with the same seed both draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NextTokenLogits = Callable[[Tensor, Cache], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token, else logits are divided by it and sampled.
        top_k: sample among so many of the likeliest tokens only, 0 among all.
        top_p: sample among the likeliest tokens that have this much of the probability together.
        repetition_penalty: above 1, tokens of the prompt and of the answer become less likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def processors(self) -> LogitsProcessorList:
        """Returns transformers' processors for these options, in the order of ``generate``."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0:
            return found
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found


GREEDY = Sampling()


@torch.no_grad()
def iterate_ids(
    next_token_logits: NextTokenLogits,
    prompt: list[int],
    *,
    cache: Cache,
    num_cached: int = 0,
    max_new_tokens: int,
    stop_ids: Collection[int],
    device: torch.device,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Yields the token ids that follow ``prompt``, the stop token included, as they are chosen.

    A token is in the cache once the next one is asked for.

    Ranks: all (collective).

    Args:
        next_token_logits: maps new token ids ``(1, tokens)`` and the cache to ``(1, vocabulary)``.
        prompt: token ids.
        cache: keys and values of the first ``num_cached`` tokens of the prompt.
        num_cached: fewer than the prompt has.
        max_new_tokens: upper bound of the number of tokens.
        stop_ids: tokens that end the text.
        device: this rank's device.
        sampling: how a token is chosen.
    """
    processors = sampling.processors()
    inputs = torch.tensor([prompt[num_cached:]], device=device)
    seen = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = processors(seen, next_token_logits(inputs, cache).float())[0]  # pyright: ignore[reportArgumentType]
        if sampling.temperature > 0:
            token = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        else:
            token = logits.argmax().reshape(1)
        if dist.is_initialized():
            dist.broadcast(token, src=0)
        yield int(token)
        if int(token) in stop_ids:
            return
        inputs = token.reshape(1, 1)
        if sampling.repetition_penalty != 1.0:
            seen = torch.cat([seen, inputs], dim=1)


def generate_ids(
    next_token_logits: NextTokenLogits,
    prompt: list[int],
    *,
    cache: Cache,
    max_new_tokens: int,
    stop_ids: Collection[int],
    device: torch.device,
) -> list[int]:
    """Returns the likeliest token ids that follow ``prompt``, without the stop token.

    Ranks: all (collective).

    Args:
        next_token_logits: as for `iterate_ids`.
        prompt: token ids.
        cache: an empty key-value cache.
        max_new_tokens: upper bound of the result's length.
        stop_ids: tokens that end the text.
        device: this rank's device.
    """
    ids = iterate_ids(
        next_token_logits, prompt, cache=cache, max_new_tokens=max_new_tokens, stop_ids=stop_ids,
        device=device,
    )  # fmt: skip
    return [token for token in ids if token not in stop_ids]
