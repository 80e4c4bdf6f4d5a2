"""A base that is not what was written, or not what the recipe asks for, is never used."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import bases
from support.ranks import RankPool
from support.tiny import save_tiny_llama

from fsdpq.errors import CheckpointError, DamagedBaseError, EnvironmentProblemError
from fsdpq.model.loading.base_file import BaseFile
from fsdpq.model.loading.base_writer import create_file
from fsdpq.tensor_files.base_layout import StoredTensor, lay_out
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, Key, read_manifest
from fsdpq.tensor_files.header import read_header

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its base; tests take copies."""
    root = tmp_path_factory.mktemp("damaged")
    # Wide enough for several chunks of 1 MiB.
    directory = save_tiny_llama(root / "model", hidden_size=512, intermediate_size=1408)
    ranks.run(1, bases.write, directory, root / "base", {})
    return directory, root / "base"


def refusal(
    base: Path, directory: Path, sections: dict[str, Any], key: Key | None
) -> dict[str, str]:
    """Tries to load from the base; returns the error."""
    try:
        bases.assemble_from(base, directory, sections, key)
    except CheckpointError as error:
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def middle_of(base: Path, name: str) -> int:
    entry = read_header(base / WEIGHTS_NAME).entries[name]
    return (entry.start + entry.stop) // 2


@pytest.mark.parametrize(
    "name", [f"{LAYER}.codes", f"{LAYER}.absmax", f"{LAYER}.nested_absmax", "model.norm.weight"]
)
def test_changed_weight_is_found_and_told_by_file_tensor_and_offset(
    ranks: RankPool, tmp_path: Path, made: tuple[Path, Path], name: str
) -> None:
    directory, whole = made
    base = shutil.copytree(whole, tmp_path / "base")
    position = middle_of(base, name)
    flip(base / WEIGHTS_NAME, position)
    [error] = ranks.run(1, refusal, base, directory, {}, read_manifest(whole).key)
    assert error["kind"] == DamagedBaseError.__name__
    assert error["hint"] == f"delete {base}: the next run makes it again"
    told = re.fullmatch(
        rf"the base {base} is damaged: bytes (\d+) to (\d+) of base.safetensors do not fit their "
        r"checksum \(rank 0 needs them for `(.+)` at bytes (\d+) to (\d+)\)",
        error["message"],
    )
    assert told is not None, error["message"]
    chunk_start, chunk_stop, tensor, start, stop = told.groups()
    assert int(chunk_start) <= position < int(chunk_stop)
    # The first tensor that has rows in this chunk.
    entry = read_header(base / WEIGHTS_NAME).entries[tensor]
    assert (entry.start, entry.stop) == (int(start), int(stop))
    assert entry.start < int(chunk_stop)
    assert entry.stop > int(chunk_start)


def truncate(base: Path) -> None:
    path = base / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the header": (lambda base: flip(base / WEIGHTS_NAME, 60), "the header of base.safetensors"),
    "the header's length": (lambda base: flip(base / WEIGHTS_NAME, 1), "the header of base"),
    "the checksums": (lambda base: flip(base / "checksums.bin", 3), "checksums.bin is not what"),
    "the manifest": (lambda base: flip(base / "base.json", 40), "base.json "),
    "the end": (truncate, "bytes instead of"),
    "no weights": (lambda base: (base / WEIGHTS_NAME).unlink(), "base.safetensors cannot be read"),
    "no checksums": (lambda base: (base / "checksums.bin").unlink(), "checksums.bin cannot be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory_is_found_before_anything_is_loaded(
    tmp_path: Path, made: tuple[Path, Path], damage: str
) -> None:
    base = shutil.copytree(made[1], tmp_path / "base")
    change, expected = DAMAGES[damage]
    change(base)
    with pytest.raises(DamagedBaseError) as caught:
        BaseFile(base)
    assert caught.value.message.startswith(f"the base {base} is damaged: ")
    assert expected in caught.value.message
    assert caught.value.hint == f"delete {base}: the next run makes it again"


def test_every_single_byte_of_the_manifest_counts(tmp_path: Path, made: tuple[Path, Path]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    original = (made[1] / "base.json").read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 0x01
        (base / "base.json").write_bytes(changed)
        if json_equal(changed, original):
            continue  # white space
        with pytest.raises(CheckpointError):
            read_manifest(base)


def json_equal(changed: bytearray, original: bytes) -> bool:
    try:
        return json.loads(changed) == json.loads(original)
    except ValueError:
        return False


def key_with(key: Key, **changes: Any) -> Key:
    return {**key, **{name: {**key[name], **change} for name, change in changes.items()}}


def test_foreign_base_is_refused_in_words(ranks: RankPool, made: tuple[Path, Path]) -> None:
    directory, base = made
    key = read_manifest(base).key
    for other, words in (
        (
            key_with(key, quantization={"block_size": 128}),
            "quantized with block_size 64, the recipe says 128",
        ),
        (key_with(key, model={"sha256": "0" * 64}), f"made from {directory} (sha256 "),
        (key_with(key, versions={"bitsandbytes": "0.1"}), "made with bitsandbytes "),
        ({**key, "dtype": "bf16"}, "kept in dtype fp32, not bf16"),
        ({**key, "format": 0}, "made in format 1, this version writes 0"),
    ):
        [error] = ranks.run(1, refusal, base, directory, {}, other)
        assert error["kind"] == CheckpointError.__name__
        assert words in error["message"]


def test_base_whose_tensors_do_not_fit_is_refused_with_their_names(
    ranks: RankPool, made: tuple[Path, Path]
) -> None:
    directory, base = made
    sections = {"quantization": {"kind": "bnb", "block_size": 128}}
    [error] = ranks.run(1, refusal, base, directory, sections, None)
    found = "`model.layers.0.mlp.gate_proj.weight.nested_absmax` as U8 [44, 4]"
    assert f"with {found}, the model needs U8 [22, 4]" in error["message"]


def notices(base: Path, directory: Path, key: Key) -> tuple[str, ...]:
    return bases.assemble_from(base, directory, {}, key).notices


def test_base_without_a_manifest_is_passed_by(
    ranks: RankPool, tmp_path: Path, made: tuple[Path, Path]
) -> None:
    directory, whole = made
    base = shutil.copytree(whole, tmp_path / "base")
    (base / "base.json").unlink()
    for missing in (base, tmp_path / "nowhere"):
        [told] = ranks.run(1, notices, missing, directory, read_manifest(whole).key)
        assert told == (f"the quantized base {missing} is gone: quantizing {directory} again",)


def test_trained_weights_need_the_original(
    ranks: RankPool, tmp_path: Path, made: tuple[Path, Path]
) -> None:
    directory, whole = made
    base = shutil.copytree(whole, tmp_path / "base")
    shutil.copy(directory / "config.json", base)
    sections = {"adapter": {"kind": "llama_pro", "num_new_layers": 1}}
    [error] = ranks.run(1, refusal, base, base, sections, None)
    assert (
        "is a quantized base, and this recipe trains weights of the model itself"
        in error["message"]
    )


def test_full_disk_is_an_error_before_anything_is_quantized(tmp_path: Path) -> None:
    layout = lay_out({"w": StoredTensor("U8", (1 << 20, 4))})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(EnvironmentProblemError, match="cannot be written: the disk is full"):
            create_file(tmp_path / "base.safetensors", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    layout = lay_out({"w": StoredTensor("U8", (4, 4))})
    (tmp_path / "base.safetensors").write_text("mine")
    with pytest.raises(EnvironmentProblemError, match="File exists"):
        create_file(tmp_path / "base.safetensors", layout)
    assert (tmp_path / "base.safetensors").read_text() == "mine"
