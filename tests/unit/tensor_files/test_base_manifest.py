"""The manifest of a base: what it was made from, in words where it differs."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.imports import imported_by

from fsdpq.errors import CheckpointError, DamagedBaseError
from fsdpq.tensor_files.base_manifest import (
    BaseManifest,
    base_key,
    is_base,
    key_differences,
    key_digest,
    read_manifest,
    write_manifest,
)

MODEL = {"sha256": "ab" * 32, "revision": None, "source": "here", "license": "MIT"}
BNB = {"kind": "bnb", "block_size": 64, "double_quant": True, "cache": True}
KEY = base_key(model=MODEL, quantization=BNB, dtype="bf16", device="cpu")


def key(**changes: Any) -> dict[str, Any]:
    arguments = {"model": MODEL, "quantization": BNB, "dtype": "bf16", "device": "cpu"}
    return base_key(**(arguments | changes))


def test_key_names_the_versions_that_decide_about_the_bits() -> None:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    assert KEY["versions"] == versions
    assert "bitsandbytes" not in key(quantization={"kind": "none"})["versions"]


@pytest.mark.parametrize(
    "same",
    [
        {"model": MODEL | {"source": "elsewhere", "revision": "main"}},
        {"quantization": BNB | {"cache": False}},
    ],
)
def test_where_a_model_came_from_and_whether_to_cache_change_nothing(same: dict[str, Any]) -> None:
    assert key_differences(KEY, key(**same)) == []
    assert key_digest(KEY) == key_digest(key(**same))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            key(quantization=BNB | {"block_size": 128}),
            "quantized with block_size 64, the recipe says 128",
        ),
        (key(quantization={"kind": "none"}), "quantized by bnb, the recipe says none"),
        (key(dtype="fp32"), "kept in dtype bf16, not fp32"),
        (key(device="cuda"), "quantized on device cpu, not cuda"),
        (
            key(model=MODEL | {"sha256": "cd" * 32}),
            "made from here (sha256 abababababab), not from here (sha256 cdcdcdcdcdcd)",
        ),
    ],
)
def test_difference_is_told_in_words(wanted: dict[str, Any], words: str) -> None:
    assert key_differences(KEY, wanted) == [words]
    assert key_digest(KEY) != key_digest(wanted)


def test_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = BaseManifest(KEY, 3 << 20, 1 << 20, 4096, "0" * 64, "1" * 64, 100, 90)
    assert not is_base(tmp_path)
    with pytest.raises(CheckpointError, match=r"it has no base\.json"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert is_base(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.num_chunks == 3


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", "[" * 100_000, '{"format": 1}', "\xff"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "base.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"base\.json"):
        read_manifest(tmp_path)


def test_base_of_another_format_is_no_damage(tmp_path: Path) -> None:
    content = {"format": 2, "what": "nobody knows"}
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tmp_path / "base.json").write_text(json.dumps({**content, "sha256": sha256}))
    with pytest.raises(CheckpointError, match="of format 2, this version reads 1") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedBaseError)


def test_manifest_is_read_without_torch() -> None:
    assert imported_by("import fsdpq.tensor_files.base_manifest", ["torch", "pydantic"]) == []
