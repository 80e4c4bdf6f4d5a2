"""Memory of a whole training step: linear in the sequence length, and DoRA's near LoRA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.bench.allocations import Allocations, Fit, fit_line
from support.ranks import RankPool
from support.sharded import CPU, assemble, do_step
from support.tiny import VOCAB_SIZE, save_tiny_llama

LENGTHS = (512, 1024, 1536, 2048)
NARROW = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2}
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}


def flops_in_place(_target: Any, left: Any, right: Any, **_: Any) -> int:
    """Returns the operations of ``addmm_`` by the shapes of its arguments."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: flops_in_place}
"""What torch's counter leaves out."""


def one_row(length: int) -> Step:
    """Returns a step of a single row, all of it trained."""
    ids = torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1))
    row = Row(ids.tolist(), [False] + [True] * (length - 1))
    return build_step([row], micro_batch_size=1, rank=0, world_size=1)


def measure_steps(
    directory: Path, lengths: tuple[int, ...], sections: dict[str, dict[str, Any]]
) -> list[tuple[int, int]]:
    """Returns peak bytes and flops of a step at every length."""
    assembled = assemble(directory, **sections)
    optimizer = torch.optim.AdamW(assembled.trainable, lr=1e-3, fused=True)
    do_step(assembled, optimizer, one_row(lengths[0]))  # makes the optimizer's states
    found: list[tuple[int, int]] = []
    for length in lengths:
        step = one_row(length)
        with Allocations() as allocations:
            do_step(assembled, optimizer, step)
        found.append((allocations.peak_bytes, 0))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        do_step(assembled, optimizer, one_row(lengths[-1]))
    found[-1] = (found[-1][0], counter.get_total_flops())
    return found


def fit_of(ranks: RankPool, directory: Path, **sections: dict[str, Any]) -> Fit:
    found = ranks.run(1, measure_steps, directory, LENGTHS, sections)[0]
    return fit_line(LENGTHS, [peak for peak, _ in found])


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("narrow"), **NARROW)


@pytest.fixture(scope="module")
def plain(ranks: RankPool, narrow: Path) -> Fit:
    """LoRA over a base that is not quantized."""
    return fit_of(ranks, narrow, quantization={"kind": "none"})


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "bnb"},
        {"kind": "bnb", "quant_type": "fp4", "block_size": 4096, "double_quant": False},
        {"kind": "hqq", "nbits": 3, "group_size": 32},
        {"kind": "hqq", "nbits": 4, "group_size": 32, "axis": 0},
    ],
)
def test_peak_of_a_step_is_linear_in_the_sequence_length(
    ranks: RankPool, narrow: Path, plain: Fit, document: dict[str, Any]
) -> None:
    fit = fit_of(ranks, narrow, quantization=document)
    # Allocations are whole tensors, so the line is exact but for blocks of the kernels' buffers.
    assert fit.r_squared > 0.9999
    assert abs(fit.quadratic_share) < 0.02
    # A quantized base costs nothing for each token.
    assert fit.token_bytes < 1.01 * plain.token_bytes


def test_the_fit_notices_attention_that_is_not_linear(ranks: RankPool, narrow: Path) -> None:
    fit = fit_of(ranks, narrow, model={"attn_implementation": "eager"})
    assert fit.r_squared < 0.99
    assert fit.quadratic_share > 0.5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.mark.parametrize(
    "quantization",
    [
        {"kind": "bnb"},
        {"kind": "bnb", "quant_type": "fp4"},
        {"kind": "hqq", "nbits": 4},
        {"kind": "none"},
    ],
)
def test_dora_costs_about_what_lora_costs(
    ranks: RankPool, wide: Path, quantization: dict[str, Any]
) -> None:
    (lora_bytes, lora_flops), (dora_bytes, dora_flops) = (
        ranks.run(
            1,
            measure_steps,
            wide,
            (512,),
            {
                "quantization": quantization,
                "adapter": {"kind": kind, "rank": 16, "alpha": 32.0},
            },
        )[0][0]
        for kind in ("lora", "dora")
    )
    # Rank 16 beside 512 tokens in one product of three is 1%. LoRA may leave out what it need not
    # compute again.
    assert dora_flops < 1.15 * lora_flops
    # What comes before the magnitudes is kept for q, k, v, o and down of the layer that is
    # computed again. PEFT's ratio is 1.75 here (docs/developing/log.md).
    assert dora_bytes < 1.15 * lora_bytes
