"""Casts of buffers: which ones, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsdpq.fsdp.precision import apply_buffers_dtype
from fsdpq.recipe.precision import Precision


class Block(nn.Module):
    """Buffers of every sort that models of transformers have."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.tensor(13.856, dtype=dtype), persistent=False)
        self.inv_freq = nn.Buffer(torch.ones(4), persistent=False)
        self.positions = nn.Buffer(torch.arange(4), persistent=False)
        self.running = nn.Buffer(torch.ones(4, dtype=dtype))
        self.e_score_correction_bias = nn.Buffer(torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_cast_before_or_after_loading_and_some_stay_fp32(persistent: bool) -> None:
    model = nn.Sequential(Block(torch.float32))
    narrow = Precision("fp32", "bf16", "fp32", buffers="bf16", base="fp32")
    kept = {"e_score_correction_bias"}
    apply_buffers_dtype(model, narrow, persistent=persistent, fp32_names=kept)
    found = {name[2:]: buffer.dtype for name, buffer in model.named_buffers()}
    assert found == {
        "scale": torch.float32 if persistent else torch.bfloat16,
        "inv_freq": torch.float32,
        "positions": torch.int64,
        "running": torch.bfloat16 if persistent else torch.float32,
        "e_score_correction_bias": torch.float32,
    }
    assert list(model.state_dict()) == ["0.running", "0.e_score_correction_bias"]


def test_fp32_buffers_of_a_bf16_base_include_those_that_transformers_keeps_in_fp32() -> None:
    model = Block(torch.bfloat16)
    wide = Precision("fp32", "bf16", "fp32", buffers="fp32", base="bf16")
    apply_buffers_dtype(model, wide, persistent=True, fp32_names={"e_score_correction_bias"})
    assert model.e_score_correction_bias.dtype == torch.float32
