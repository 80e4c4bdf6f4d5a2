"""Tokens are chosen as transformers' ``generate`` chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import save_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from fsdpq.training.sample import GREEDY, Sampling, iterate_ids

PROMPT = [5, 17, 200, 33, 5, 9]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_tiny_llama(tmp_path_factory.mktemp("model"), tied=False)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(8)  # some tokens are likelier than others
    return loaded.eval()


def ours(model: Any, sampling: Sampling, *, seed: int = 0, stop_ids: tuple[int, ...] = ()) -> list:
    def next_token_logits(input_ids: Tensor, cache: Cache) -> Tensor:
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return output.logits[:, -1]

    torch.manual_seed(seed)
    ids = iterate_ids(
        next_token_logits, PROMPT, cache=DynamicCache(config=model.config), max_new_tokens=12,
        stop_ids=stop_ids, device=CPU, sampling=sampling,
    )  # fmt: skip
    return list(ids)


def theirs(model: Any, *, seed: int = 0, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    ids = model.generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=12, eos_token_id=None, **options
    )
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.4},
    ],
)
def test_the_same_seed_draws_the_same_tokens(model: Any, options: dict[str, Any]) -> None:
    drawn = [ours(model, Sampling(**options), seed=seed) for seed in range(4)]
    expected = [
        theirs(model, seed=seed, do_sample=True, **({"top_k": 0} | options)) for seed in range(4)
    ]
    assert drawn == expected
    assert len({tuple(ids) for ids in drawn}) > 1, "it is drawn at all"


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_without_temperature_the_likeliest_token_is_taken(model: Any, penalty: float) -> None:
    greedy = ours(model, Sampling(repetition_penalty=penalty))
    assert greedy == theirs(model, do_sample=False, repetition_penalty=penalty)


def test_the_token_that_ends_the_text_comes_last(model: Any) -> None:
    free = ours(model, GREEDY)
    stop = free[5]
    assert ours(model, GREEDY, stop_ids=(stop,)) == free[: free.index(stop) + 1]
