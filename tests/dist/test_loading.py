"""All ranks together read a checkpoint once; a file that changes meanwhile is named with rank."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import save_tiny_llama
from torch import Tensor

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import CheckpointFiles


def count_read_bytes(directory: Path) -> int:
    """Loads the model; returns the bytes of the checkpoint that this rank read."""
    read, counted = CheckpointFiles.read_matrix_rows, []

    def count(files: CheckpointFiles, name: str, start: int, stop: int) -> Tensor:
        rows = read(files, name, start, stop)
        counted.append(rows.nbytes)
        return rows

    with mock.patch.object(CheckpointFiles, "read_matrix_rows", count):
        assemble(directory)
    return sum(counted)


def load_from_a_file_that_is_cut(directory: Path) -> str:
    """Cuts the file when the last rank has read a little; returns what that rank then says."""
    read, last = CheckpointFiles.read_matrix_rows, dist.get_rank() == dist.get_world_size() - 1

    def cut(files: CheckpointFiles, name: str, start: int, stop: int) -> Tensor:
        if last:
            os.truncate(files.matrix_range(name, start, stop).path, 20_000)
        return read(files, name, start, stop)

    if not last:
        return ""
    files = CheckpointFiles(directory)
    with mock.patch.object(CheckpointFiles, "read_matrix_rows", cut):
        try:
            files.read_rows("model.norm.weight", 0, 192)
        except CheckpointError as error:
            return error.message
    return "nothing"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_ranks_together_read_each_byte_once(
    tmp_path: Path, ranks: RankPool, family: str
) -> None:
    changes = {"num_local_experts": 4} if family == "mixtral" else {}
    save_tiny_llama(tmp_path, family=family, **changes)
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    read = ranks.run(3, count_read_bytes, tmp_path)
    assert sum(read) == whole
    assert max(read) < whole / 2


def test_a_file_cut_during_the_load_names_the_rank(tmp_path: Path, ranks: RankPool) -> None:
    save_tiny_llama(tmp_path)
    *_, message = ranks.run(2, load_from_a_file_that_is_cut, tmp_path)
    assert message.startswith(f"rank 1: `{tmp_path / 'model.safetensors'}` ends at byte 20000, ")
    assert "of tensor `model.norm.weight` were read" in message
