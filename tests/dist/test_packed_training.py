"""Packed rows train as the same rows unpacked do, sharded, checkpointed, and in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpq.data.pack import pack_rows
from support.flash import install_fake_flash_attention
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama


def run(
    directory: Path, attention: str, packed: bool, layer_chunks: int = 1
) -> tuple[list[float], list[float]]:
    """Returns losses and norms of three steps; the whole set of rows is every step's batch."""
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
        return train(assembled, [batch] * 3, micro_batch_size=2, lr=1e-3, max_norm=1.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_packing_does_not_change_the_numbers(
    ranks: RankPool, tmp_path: Path, attention: str
) -> None:
    directory = save_tiny_llama(tmp_path)
    plain = ranks.run(2, run, directory, attention, False)[0]
    packed = ranks.run(2, run, directory, attention, True)[0]
    chunked = ranks.run(2, run, directory, attention, True, 2)[0]
    assert len(set(plain[0])) == 3
    for mine in (packed, chunked):
        # fp32 sums in another order, amplified by three Adam steps.
        assert mine[0] == pytest.approx(plain[0], rel=1e-5)
        assert mine[1] == pytest.approx(plain[1], rel=1e-5)
