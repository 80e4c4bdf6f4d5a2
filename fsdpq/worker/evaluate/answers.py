"""What one rank computes for lm-evaluation-harness: how likely tokens are, and what follows a text.

Knows nothing of the harness. All ranks call these at once, each with its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache

from fsdpq import dist
from fsdpq.data.dealing.collate import PAD_ID
from fsdpq.model.causal_lm import CausalLM

SAMPLING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Scored:
    """A row of tokens, and continuations of it that are to be scored.

    Attributes:
        input_ids: what the model reads, ``(tokens,)``, int32.
        endings: token ids of each continuation; the last of them follows ``input_ids``, the others
            are its last tokens.
    """

    input_ids: Any
    endings: tuple[tuple[int, ...], ...]


def score_rows(
    model: CausalLM, rows: Sequence[Scored], device: torch.device
) -> list[list[tuple[float, bool]]]:
    """Returns for each ending of each row its log-probability, and whether it is the greedy one.

    Ranks: all (collective), each with its own rows.
    """
    width = max([len(row.input_ids) for row in rows] or [1])
    ids = np.full((max(1, len(rows)), width), PAD_ID, dtype=np.int64)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = row.input_ids
        for ending in row.endings:
            positions += range(index * width + length - len(ending), index * width + length)
            targets += ending
    scores = model.token_scores(
        torch.from_numpy(ids).to(device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.tensor(targets, dtype=torch.int64, device=device),
    ).cpu()
    found: list[list[tuple[float, bool]]] = []
    done = 0
    for row in rows:
        answers: list[tuple[float, bool]] = []
        for ending in row.endings:
            part = scores[done : done + len(ending)]
            answers.append((float(part[:, 0].sum()), bool(part[:, 1].all())))
            done += len(ending)
        found.append(answers)
    return found


@torch.no_grad()
def continue_rows(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    is_over: Callable[[list[int]], bool],
    sampling: Mapping[str, float],
    device: torch.device,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, up to the first stop.

    Ranks: all (collective), each with its own prompts.

    Args:
        model: sharded and loaded.
        prompts: token ids.
        max_new_tokens: longest answer.
        stop_ids: tokens that end an answer, and are no part of it.
        is_over: whether an answer has come to its end without one.
        sampling: values of `SAMPLING`; empty takes the likeliest token.
        device: this rank's device.
    """
    inputs, mask = _pad_left(prompts, device)
    cache = DynamicCache(config=model.hf.config)
    choose = _chooser(sampling)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    has_padding = bool((mask == 0).any())
    for _ in range(max_new_tokens):
        logits = model.next_token_logits(inputs, cache, mask if has_padding else None).float()
        tokens = choose(logits)
        for row in sorted(open_rows):
            token = int(tokens[row])
            if token in stop_ids:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if is_over(answers[row]):
                open_rows.discard(row)
        if not any(dist.gather_numbers(float(len(open_rows)))):
            break
        inputs = tokens.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns ids and mask, ``(rows, tokens)``; one row of one token where there are no prompts."""
    width = max([len(prompt) for prompt in prompts] or [1])
    ids = torch.full((max(1, len(prompts)), width), PAD_ID)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, : width - len(prompt)] = 0
    return ids.to(device), mask.to(device)


def _chooser(sampling: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
    """Returns what picks the next token of every row."""
    if not sampling:
        return lambda logits: logits.argmax(dim=-1)
    warpers = LogitsProcessorList()
    if (temperature := sampling.get("temperature", 1.0)) != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k := int(sampling.get("top_k", 50)):  # transformers' own default
        warpers.append(TopKLogitsWarper(top_k))
    if (top_p := sampling.get("top_p", 1.0)) < 1.0:
        warpers.append(TopPLogitsWarper(float(top_p)))
    none = torch.empty(0, 0, dtype=torch.int64)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial(warpers(none, logits).softmax(dim=-1), 1).squeeze(1)  # pyright: ignore

    return draw


def text_is_over(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]
) -> Callable[[list[int]], bool]:
    """Returns what says whether the text of tokens holds one of ``stops``.

    As the harness does, only the last tokens are decoded: as many as a stop can have, and two more.
    """
    wanted = [stop for stop in stops if stop]
    spans = [len(tokenizer.encode(stop, add_special_tokens=False)) + 2 for stop in wanted]

    def is_over(answer: list[int]) -> bool:
        return any(
            stop in str(tokenizer.decode(answer[-span:]))
            for stop, span in zip(wanted, spans, strict=True)
        )

    return is_over
