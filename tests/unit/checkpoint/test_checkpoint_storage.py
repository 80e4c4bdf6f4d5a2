"""Files of a checkpoint: safetensors that others read, and nothing that could run code."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsdpq.checkpoint.pieces import LoadPieces
from fsdpq.checkpoint.storage import CheckpointReader, read_index, write_tensors
from fsdpq.errors import CheckpointError
from fsdpq.protocols import Piece
from fsdpq.tensor_files.checkpoint_manifest import (
    INDEX_NAME,
    SavedCheckpoint,
    SavedFile,
    check_checkpoint,
)

NAME = "rank-00000.safetensors"


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "rows of a larger one": torch.arange(12.0).view(4, 3)[1:3],
        "columns": torch.arange(12).view(4, 3).T,
        "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
    }
    saved = write_tensors(tmp_path / NAME, tensors)
    content = (tmp_path / NAME).read_bytes()
    assert saved == SavedFile(len(content), hashlib.sha256(content).hexdigest())
    read = load_file(tmp_path / NAME)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def _saved(files: dict[str, SavedFile]) -> SavedCheckpoint:
    return SavedCheckpoint(1, 1, 1, None, 0.0, {}, "", {}, files)


def _index(directory: Path, part: dict[str, Any]) -> None:
    entry = {"dtype": "F32", "shape": [2], "parts": [{"offsets": [0], "shape": [2], **part}]}
    (directory / INDEX_NAME).write_text(json.dumps({"tensors": {"weights": entry}}))


def _load(directory: Path) -> torch.Tensor:
    reader = CheckpointReader(directory, _saved({NAME: SavedFile(0, "")}))
    pieces, planner = {"weights": Piece(torch.zeros(2), (2,))}, LoadPieces()
    planner.set_up_planner(pieces, reader.read_metadata())
    reader.read_data(planner.create_local_plan(), planner)
    return pieces["weights"].rows


class Bomb:
    """What a pickle may hold."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a checkpoint ran code",))


def test_a_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    write_tensors(tmp_path / NAME, {"weights": torch.tensor([1.0, 2.0])})
    _index(tmp_path, {"file": NAME})
    assert _load(tmp_path).tolist() == [1.0, 2.0]
    torch.save(Bomb(), tmp_path / NAME)
    with pytest.raises(CheckpointError, match=f"{NAME} does not fit its index"):
        _load(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be understood"):
        _load(tmp_path)
    (tmp_path / "manifest.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be understood"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "part", [{"file": "../other.safetensors"}, {"file": NAME, "shape": "2"}, {}, {"file": 3}]
)
def test_an_index_names_parts_of_listed_files_only(tmp_path: Path, part: dict[str, Any]) -> None:
    _index(tmp_path, part)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be understood"):
        read_index(tmp_path, _saved({NAME: SavedFile(0, "")}))


def test_rows_that_no_part_has_are_missed(tmp_path: Path) -> None:
    write_tensors(tmp_path / NAME, {"weights": torch.tensor([1.0])})
    _index(tmp_path, {"file": NAME, "shape": [1]})
    with pytest.raises(CheckpointError, match="does not have all rows of `weights`"):
        _load(tmp_path)
