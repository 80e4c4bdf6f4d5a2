"""Logits of all positions never exist: counted in allocations of a whole training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.ranks import RankPool
from support.sharded import CPU, assemble, do_step
from support.tiny import save_tiny_llama
from torch import Tensor
from torch.nn import functional

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.training.step import evaluate
from fsdpq.worker.bench.allocations import Allocations

VOCAB, HIDDEN, ROWS, TOKENS = 8192, 32, 4, 65
POSITIONS = ROWS * (TOKENS - 1)
LOGIT_BYTES = POSITIONS * VOCAB * 4
HEAD_BYTES = VOCAB * HIDDEN * 4
CHUNK_ROWS = 64
CHUNK_BYTES = CHUNK_ROWS * VOCAB * 4
ROUNDING = 1024
"""Allocations are rounded up to what the allocator deals in."""

SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "tied": {"tied": True},
    "soft-capped": {
        "config": {
            "family": "gemma2",
            "final_logit_softcapping": 2.0,
            "head_dim": 8,
            "sliding_window": 8,
        },
        "model": {"attn_implementation": "eager"},
    },
    "scaled by Cohere": {"tied": True, "config": {"family": "cohere", "logit_scale": 0.3}},
    "scaled by Granite": {"config": {"family": "granite", "logits_scaling": 3.0}},
    "trained head": {
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head"]},
    },
    "full finetuning": {
        "tied": True,
        "adapter": {"kind": "none"},
        "quantization": {"kind": "none"},
    },
}


def build(num_trained: int) -> Step:
    """Returns a step of one micro-batch whose rows end in so many trained tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = [False] * (TOKENS - num_trained) + [True] * num_trained
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=generator).tolist()
    rows = [Row(row, mask) for row in ids]
    return build_step(rows, micro_batch_size=ROWS, rank=0, world_size=1)


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **_: Any) -> Tensor:
    """The loss as it is usually written."""
    # A frozen head is not gathered again in backward: the product needs a weight of its own.
    kept = weight if weight.requires_grad else weight.clone()
    logits = functional.linear(hidden, kept, bias).float()
    return functional.cross_entropy(logits, targets, reduction="sum")


def measure(directory: Path, sections: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns the largest allocation and the peak of steps and of an evaluation."""
    assembled = assemble(directory, **sections)
    optimizer = torch.optim.AdamW(assembled.trainable, lr=1e-3, fused=True)
    naively = mock.patch("fsdpq.model.causal_lm.chunked_cross_entropy", naive)

    def count(step: Step, patch: AbstractContextManager[Any], *, train: bool) -> tuple[int, int]:
        with patch, Allocations() as allocations:
            if train:
                do_step(assembled, optimizer, step)
            else:
                evaluate(assembled.model, [step], device=CPU)
        return allocations.largest_bytes, allocations.peak_bytes

    with mock.patch("fsdpq.model.chunked_loss.MAX_CHUNK_LOGITS", CHUNK_ROWS * VOCAB):
        return {
            "all trained": count(build(TOKENS - 1), nullcontext(), train=True),
            "few trained": count(build(4), nullcontext(), train=True),
            "evaluation": count(build(TOKENS - 1), nullcontext(), train=False),
            "naive": count(build(TOKENS - 1), naively, train=True),
        }


@pytest.mark.parametrize("case", CASES)
def test_no_allocation_has_room_for_all_logits(ranks: RankPool, tmp_path: Path, case: str) -> None:
    sections = dict(CASES[case])
    config: dict[str, Any] = SHAPE | sections.pop("config", {})
    directory = save_tiny_llama(tmp_path, tied=bool(sections.pop("tied", False)), **config)
    found = ranks.run(1, measure, directory, sections)[0]
    # One chunk of logits in fp32 is the largest tensor of a step, and of an evaluation.
    assert found["all trained"][0] <= CHUNK_BYTES + ROUNDING
    assert found["evaluation"][0] <= CHUNK_BYTES + ROUNDING
    assert CHUNK_BYTES * 4 == LOGIT_BYTES
    # Positions without loss are dropped first: 16 of them have fewer logits than the head weights.
    assert found["few trained"][0] <= HEAD_BYTES + ROUNDING
    # 12 bytes a logit of a chunk, and the head's weight, gradients and copies beside them.
    heads = 8 if case in ("trained head", "full finetuning") else 3
    bound = 12 * CHUNK_ROWS * VOCAB + heads * HEAD_BYTES
    assert found["all trained"][1] <= bound
    # The count sees logits where they exist.
    assert found["naive"][0] >= LOGIT_BYTES
    assert found["naive"][1] >= 2 * LOGIT_BYTES
