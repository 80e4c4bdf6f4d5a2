"""Checkpoints that do not fit are explained before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import CheckpointFiles, check_tensors


def _save(directory: Path) -> Path:
    save_file(
        {"a": torch.arange(12.0).reshape(6, 2), "b": torch.ones(3)},
        directory / "model.safetensors",
    )
    return directory


def test_rows_are_read_from_one_file_and_from_several(tmp_path: Path) -> None:
    files = CheckpointFiles(_save(tmp_path))
    assert files.read_rows("a", 2, 4).tolist() == [[4.0, 5.0], [6.0, 7.0]]
    several = tmp_path / "several"
    several.mkdir()
    save_file({"a": torch.zeros(2, 2)}, several / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, several / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = several / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert CheckpointFiles(several).names == {"a", "b"}
    (several / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        CheckpointFiles(several)


def test_all_misfits_are_named_at_once(tmp_path: Path) -> None:
    found = {"a": (6, 2), "b": (3,)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(tmp_path, found, {"a": (6, 3), "c": (1,)}, ignored=set())
    assert "missing `c`" in caught.value.message
    assert "unexpected `b`" in caught.value.message
    assert "`a` has shape [6, 2], the model needs [6, 3]" in caught.value.message
    check_tensors(tmp_path, found, {"a": (6, 2)}, ignored={"b"})


def test_a_truncated_file_is_named_with_its_size(tmp_path: Path) -> None:
    path = _save(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError) as caught:
        CheckpointFiles(tmp_path)
    assert f"model.safetensors is damaged or not whole ({len(whole) - 5} bytes)" in str(
        caught.value
    )


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"lacks any \*\.safetensors file"):
        CheckpointFiles(tmp_path)
