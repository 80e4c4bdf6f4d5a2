"""Training from disk: frozen shards are pages of the base's file, and the numbers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsdpq.dist import own_shard
from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, read_manifest
from support import bases
from support.ranks import RankPool
from support.sharded import train
from support.tiny import random_rows, save_tiny_llama


def anonymous_bytes() -> int:
    """Returns the memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def train_twice(base: Path | None, directory: Path, offload: str) -> dict[str, Any]:
    """Loads, trains three steps; returns losses and what of the base became memory."""
    before = anonymous_bytes()
    sections = {"fsdp": {"offload": offload}}
    assembled = bases.assemble_from(base, directory, sections)
    frozen = [own_shard(p).rows for p in assembled.model.parameters() if not p.requires_grad]
    loaded = anonymous_bytes() - before
    losses, norms = train(
        assembled,
        [random_rows(4, seed=seed) for seed in range(3)],
        micro_batch_size=2,
        lr=1e-3,
        max_norm=1.0,
    )
    after = [own_shard(p).rows for p in assembled.model.parameters() if not p.requires_grad]
    return {
        "numbers": (losses, norms),
        "loaded": loaded,
        "own": sum(rows.nbytes for rows in frozen),
        "moved": sum(
            new.nbytes
            for old, new in zip(frozen, after, strict=True)
            if old.data_ptr() != new.data_ptr()
        ),
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_losses_are_those_of_host_memory_also_with_uneven_rows(
    ranks: RankPool, tmp_path: Path, num_ranks: int
) -> None:
    directory = save_tiny_llama(tmp_path / "model")  # 331 rows of the embedding: odd
    ranks.run(2, bases.write, directory, tmp_path / "base", {})
    for mapped, copied in zip(
        ranks.run(num_ranks, train_twice, tmp_path / "base", directory, "disk"),
        ranks.run(num_ranks, train_twice, None, directory, "cpu"),
        strict=True,
    ):
        assert mapped["numbers"] == copied["numbers"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_base_never_becomes_memory_of_the_process(
    ranks: RankPool, tmp_path: Path, num_ranks: int
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 32768}
    directory = save_tiny_llama(tmp_path / "model", **wide)
    ranks.run(2, bases.write, directory, tmp_path / "base", {})
    ranks.run(num_ranks, train_twice, tmp_path / "base", directory, "disk")  # libraries warm up
    for answer in ranks.run(num_ranks, train_twice, tmp_path / "base", directory, "disk"):
        assert answer["own"] > 60e6 / num_ranks
        adapters = 2e6
        assert answer["loaded"] < 0.05 * answer["own"] + adapters
        # FSDP pads a copy where a rank has fewer rows than others: second-level scales alone.
        assert answer["moved"] < 1e-3 * answer["own"]
    found = load_file(tmp_path / "base" / WEIGHTS_NAME)
    expected = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], expected)


def refusal(base: Path | None, directory: Path) -> str:
    try:
        bases.assemble_from(base, directory, {"fsdp": {"offload": "disk"}})
    except CheckpointError as error:
        return str(error)
    return ""


def test_without_a_base_there_is_nothing_to_map(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "model")
    [told] = ranks.run(1, refusal, None, directory)
    assert "`fsdp.offload: disk` maps a quantized base from its file, and there is none" in told


def test_damage_is_found_before_rows_are_mapped(ranks: RankPool, tmp_path: Path) -> None:
    directory, base = save_tiny_llama(tmp_path / "model"), tmp_path / "base"
    ranks.run(1, bases.write, directory, base, {})
    content = bytearray((base / WEIGHTS_NAME).read_bytes())
    content[read_manifest(base).header_bytes + 5] ^= 1
    (base / WEIGHTS_NAME).write_bytes(content)
    [told] = ranks.run(1, refusal, base, directory)
    assert "do not fit their checksum" in told
