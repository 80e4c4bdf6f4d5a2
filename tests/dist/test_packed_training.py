"""Packed rows train as the same rows unpacked do, sharded and checkpointed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsdpq.data.pack import pack_rows
from support.flash import install_fake_flash_attention
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama


def losses(directory: Path, attention: str, packed: bool, layer_chunks: int = 1) -> list[float]:
    """Returns the losses of three steps; the whole set of rows is every step's batch."""
    model = {"name_or_path": "tiny", "dtype": "fp32", "attn_implementation": attention}
    with pytest.MonkeyPatch.context() as patch:
        if attention == "flash_attention_2":
            install_fake_flash_attention(patch)
        assembled = assemble(
            directory,
            model=model,
            # Of fp32 transformers' flash attention asks a plain linear for its dtype.
            quantization={"kind": "none" if attention == "flash_attention_2" else "bnb"},
            data={"packing": "best_fit"},
            training={"layer_chunks": layer_chunks},
        )
        rows = random_rows(12)
        batch = pack_rows(rows, 48) if packed else rows
        assert packed == (len(batch) < len(rows))
        return train(assembled, [batch] * 3, micro_batch_size=2, lr=1e-3, max_norm=1.0)[0]


@pytest.mark.parametrize(
    ("attention", "layer_chunks"),
    [("sdpa", 1), ("eager", 1), ("flash_attention_2", 1), ("flash_attention_2", 2)],
)
def test_packing_does_not_change_the_losses(
    ranks: RankPool, tmp_path: Path, attention: str, layer_chunks: int
) -> None:
    directory = save_tiny_llama(tmp_path)
    torch.manual_seed(0)
    plain = ranks.run(2, losses, directory, attention, False)[0]
    packed = ranks.run(2, losses, directory, attention, True, layer_chunks)[0]
    assert len(set(plain)) == 3
    # fp32 sums in another order, amplified by three Adam steps.
    assert packed == pytest.approx(plain, rel=1e-5)
