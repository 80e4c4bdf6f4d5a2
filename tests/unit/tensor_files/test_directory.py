"""Checkpoint directories: one file, several, an index, and what is wrong with any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.directory import INDEX_NAME, read_directory


def save(directory: Path, name: str, **tensors: torch.Tensor) -> Path:
    save_file(tensors, directory / name)
    return directory / name


def save_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def problems(directory: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read_directory(directory)
    first, *lines = caught.value.message.splitlines()
    assert first == f"the checkpoint `{directory}` is not whole:"
    assert caught.value.hint
    return [line.strip() for line in lines]


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", a=torch.ones(2))
    save(tmp_path, "old-1.safetensors", a=torch.zeros(2), b=torch.zeros(2))
    save_index(tmp_path, {"a": "old-1.safetensors", "b": "old-1.safetensors"})
    found = read_directory(tmp_path)
    assert found.files == {"a": tmp_path / "model.safetensors"}
    raw, entry = found.files["a"].read_bytes(), found.entries["a"]
    whole = load_file(tmp_path / "model.safetensors")["a"]
    assert torch.frombuffer(bytearray(raw[entry.start : entry.stop]), dtype=torch.float32).equal(
        whole
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_several_files_with_and_without_an_index(tmp_path: Path, indexed: bool) -> None:
    save(tmp_path, "m-1.safetensors", a=torch.ones(2))
    save(tmp_path, "m-2.safetensors", b=torch.ones(2))
    if indexed:
        save_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
        save(tmp_path, "not-indexed.safetensors", c=torch.ones(2))
    found = read_directory(tmp_path)
    assert {name: path.name for name, path in found.files.items()} == {
        "a": "m-1.safetensors", "b": "m-2.safetensors",
    }  # fmt: skip
    assert [header.path.name for header in found.headers] == ["m-1.safetensors", "m-2.safetensors"]


def test_everything_wrong_with_all_files_is_said_at_once(tmp_path: Path) -> None:
    save(tmp_path, "m-1.safetensors", a=torch.ones(2), twice=torch.ones(2))
    cut = save(tmp_path, "m-2.safetensors", b=torch.ones(4), twice=torch.ones(2))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-4])
    (tmp_path / "m-4.safetensors").write_bytes(b"\xff" * 20)
    save_index(
        tmp_path,
        {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}
        | {"d": "m-3.safetensors", "e": "m-4.safetensors"},
    )
    size = len(whole)
    assert problems(tmp_path) == [
        "`m-3.safetensors` is missing, the index names it",
        (f"`m-2.safetensors` ends at byte {size - 4}, tensor `twice` needs bytes {size - 8} to "
        f"{size}"),
        "tensor `twice` is in `m-1.safetensors` and in `m-2.safetensors`",
        (f"`m-4.safetensors` claims a header of {2**64 - 1} bytes, the format allows 100000000: it "
        "is no safetensors file, or damaged at byte 0"),
        "`m-1.safetensors` lacks tensor `c`, the index says it is there",
    ]  # fmt: skip


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    save_index(tmp_path, {str(n): f"m-{n:02}.safetensors" for n in range(50)})
    assert len(problems(tmp_path)) == 21
    assert problems(tmp_path)[-1] == "and 30 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no table `weight_map`"),
        ('{"weight_map": ["m.safetensors"]}', "no table `weight_map`"),
        ('{"weight_map": {"a": ["m.safetensors"]}}', "no name of a file in the directory"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "no name of a file in the directory"),
        ('{"weight_map": {"a": "/m.safetensors"}}', "no name of a file in the directory"),
        ('{"weight_map": {"a": "m.bin"}}', "`m.bin` is no safetensors file"),
        ('{"weight_map": {}}', "names no file"),
        ("\x00", "cannot be read"),
    ],
)
def test_hostile_indexes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    (found,) = problems(tmp_path)
    assert message in found


def test_pickles_are_refused_with_a_way_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds pickle weights only") as caught:
        read_directory(tmp_path)
    assert "save_pretrained" in caught.value.hint
    (tmp_path / "pytorch_model.bin").unlink()
    assert problems(tmp_path) == ["there are no weights (`*.safetensors`)"]
