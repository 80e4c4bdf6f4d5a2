"""Packed rows train as the same rows unpacked do, sharded, checkpointed, and in chunks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.flash import install_fake_flash_attention
from support.ranks import RankPool
from support.sharded import assemble, named_trained, train
from support.tiny import VOCAB_SIZE, random_rows, save_tiny_llama
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.pack import pack_rows
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole, rank, world_size

KERNELS = ["sdpa", "eager", "flash_attention_2"]


def build(
    directory: Path, attention: str, patch: pytest.MonkeyPatch, **sections: dict[str, Any]
) -> Any:
    """Returns the tiny model, assembled for packed rows.

    Ranks: all (collective).
    """
    if attention == "flash_attention_2":
        install_fake_flash_attention(patch)
    return assemble(
        directory,
        model={"name_or_path": "tiny", "dtype": "fp32", "attn_implementation": attention},
        # Of fp32 transformers' flash attention asks a plain linear for its dtype.
        quantization={"kind": "none" if attention == "flash_attention_2" else "bnb"},
        data={"packing": "best_fit"},
        **sections,
    )


def run(
    directory: Path, attention: str, packed: bool, layer_chunks: int = 1
) -> tuple[list[float], list[float]]:
    """Returns losses and norms of three steps; the whole set of rows is every step's batch."""
    with pytest.MonkeyPatch.context() as patch:
        assembled = build(directory, attention, patch, training={"layer_chunks": layer_chunks})
        assert (assembled.model.longest_alone > 0) == (attention == "sdpa")
        rows = random_rows(12)
        batch = pack_rows(rows, 48) if packed else rows
        assert packed == (len(batch) < len(rows))
        return train(assembled, [batch] * 3, micro_batch_size=2, lr=1e-3, max_norm=1.0)


@pytest.mark.parametrize("attention", KERNELS)
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


def longest_alone(directory: Path, sections: dict[str, Any]) -> tuple[int, bool]:
    """Returns what the assembled model does with packed documents.

    Ranks: all (collective).
    """
    with pytest.MonkeyPatch.context() as patch:
        model = build(directory, "sdpa", patch, **sections).model
    return model.longest_alone, model.masks_packed


def test_what_cannot_compute_documents_alone_gets_masks(ranks: RankPool, tmp_path: Path) -> None:
    llama = save_tiny_llama(tmp_path / "llama")
    falcon = save_tiny_llama(
        tmp_path / "falcon", family="falcon", new_decoder_architecture=True, num_kv_heads=2
    )
    compiled = {"training": {"compile": True}}
    found = [
        ranks.run(1, longest_alone, directory, sections)[0]
        for directory, sections in ((llama, {}), (llama, compiled), (falcon, {}))
    ]
    assert found == [(sys.maxsize, False), (0, False), (0, True)]


SECOND = 23
"""Tokens of the documents that are trained; those before them are not."""


def made_up(length: int, seed: int, *, trained: bool) -> Row:
    ids = torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))
    return Row(ids.int().numpy(), (trained & (np.arange(length) > 0)).astype(np.uint8))


def sequences(seed: int | None) -> list[Row]:
    """Returns four rows of at most 40 tokens, the documents before the last ones made by ``seed``.

    There are documents of one token and of a whole sequence, and a sequence that ends in padding.
    Without a seed there is nothing before the last documents.
    """
    rows: list[Row] = []
    for index, before in enumerate(([1, 16], [5, 11, 1], [2], [])):
        last = made_up(SECOND if before else 40, index, trained=True)
        numbers = [] if seed is None else [(n, seed + 10 * index + n) for n in before]
        rows += [_joined([*(made_up(n, s, trained=False) for n, s in numbers), last])]
    return rows


def _joined(rows: list[Row]) -> Row:
    [packed] = pack_rows(rows, sum(len(row.input_ids) for row in rows))
    # The order of the rows is kept, whatever their lengths are.
    assert packed.document_lengths == tuple(len(row.input_ids) for row in rows)
    return packed


def adapter_gradients(
    directory: Path, attention: str, sections: dict[str, Any], seed: int | None
) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss of the last documents, and the whole gradient of every adapter weight.

    Ranks: all (collective).
    """
    with pytest.MonkeyPatch.context() as patch:
        assembled = build(directory, attention, patch, **sections)
        named = named_trained(assembled)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # B is zero at first, and so would be the gradients of A
            for parameter in named.values():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.add_(0.05 * torch.randn(local.shape, generator=generator))
        assembled.model.train()
        step = build_step(sequences(seed), micro_batch_size=2, rank=rank(), world_size=world_size())
        total = torch.zeros(())
        for batch in step.micro_batches:
            loss = assembled.model(
                batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids
            )
            loss.backward()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        gradients = {name: p.grad for name, p in named.items()}
        assert all(gradient is not None for gradient in gradients.values())
        return total.item(), {n: gather_whole(g).clone() for n, g in gradients.items()}  # pyright: ignore


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("layer_chunks", [1, 2])
def test_adapters_do_not_notice_the_documents_before(
    ranks: RankPool, tmp_path: Path, attention: str, layer_chunks: int
) -> None:
    family = {"family": "gemma3_text", "head_dim": 48, "sliding_window": 20}
    changes = family if attention == "sdpa" else {}
    directory = save_tiny_llama(tmp_path, **changes)  # pyright: ignore[reportArgumentType]
    sections: dict[str, Any] = {"training": {"layer_chunks": layer_chunks}}
    sections["adapter"] = {"kind": "dora" if layer_chunks == 2 else "lora", "rank": 4, "alpha": 8.0}
    num_ranks = 2 if layer_chunks == 1 else 1
    found = [
        ranks.run(num_ranks, adapter_gradients, directory, attention, sections, seed)[0]
        for seed in (None, 100, 200)
    ]
    alone, wanted = found[0]
    # Alone, tensors have other shapes, and fp32 sums another order.
    for (loss, gradients), (base, expected), tolerance in (
        (found[1], (alone, wanted), 1e-5),
        (found[2], found[1], 1e-6),
    ):
        assert loss == pytest.approx(base, rel=tolerance)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            size = expected[name].abs().max().item()
            assert size > 0, name
            assert torch.allclose(gradient, expected[name], rtol=0, atol=tolerance * size), name
