"""The manifest of a checkpoint, without torch: what is listed, what is refused, what is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.checkpoint_manifest import (
    MANIFEST_NAME,
    SavedCheckpoint,
    SavedFile,
    base_identity,
    check_checkpoint,
    choose_kept,
    draft_directory,
    list_checkpoints,
    list_drafts,
    read_checkpoint,
    step_directory,
    write_manifest,
)

FILES = {"index.json": b"{}", "state.json": b'{"a": 1}', "rank-00000.safetensors": b"weights"}


def save(folder: Path, step: int, **changes: Any) -> Path:
    """Writes a small checkpoint."""
    directory = step_directory(folder, step)
    directory.mkdir(parents=True)
    files: dict[str, SavedFile] = {}
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
        files[name] = SavedFile(len(content), hashlib.sha256(content).hexdigest())
    saved = SavedCheckpoint(
        step, 7 * step, 2, 1.25, 1700000000.5, {"optimizer": {"kind": "adamw"}}, "rows",
        {"sha256": "ab", "revision": None, "source": "é"}, files,
    )  # fmt: skip
    write_manifest(directory, dataclasses.replace(saved, **changes))
    return directory


def test_a_manifest_comes_back_and_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    newest = [save(tmp_path, step) for step in (9, 100, 123456789)][::-1]
    draft_directory(newest[0]).mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert list_checkpoints(tmp_path) == newest
    assert list_drafts(tmp_path) == [tmp_path / ".step-123456789.partial"]
    saved = check_checkpoint(newest[1])
    assert (saved.step, saved.tokens, saved.eval_loss) == (100, 700, 1.25)
    assert saved.num_bytes == sum(map(len, FILES.values()))
    assert saved.base["source"] == "é"


def rewrite(directory: Path, **changes: Any) -> None:
    """Changes a manifest and hashes it anew, as a stranger would."""
    document = json.loads((directory / MANIFEST_NAME).read_text()) | changes
    document.pop("sha256")
    content = json.dumps(document, sort_keys=True).encode()
    document["sha256"] = hashlib.sha256(content).hexdigest()
    (directory / MANIFEST_NAME).write_bytes((json.dumps(document, indent=1) + "\n").encode())


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 3) / MANIFEST_NAME
    content = path.read_bytes()
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << (index % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            read_checkpoint(path.parent)
    for size in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            read_checkpoint(path.parent)
    path.write_bytes(content)
    assert read_checkpoint(path.parent).step == 3


def test_a_strangers_manifest_names_files_of_its_own_directory_only(tmp_path: Path) -> None:
    directory = save(tmp_path, 3)
    files = json.loads((directory / MANIFEST_NAME).read_text())["files"]
    for name in ("../secret", "/etc/passwd", "a/b", ".hidden", ""):
        rewrite(directory, files=files | {name: {"num_bytes": 1, "sha256": "0"}})
        with pytest.raises(CheckpointError, match="cannot be understood"):
            read_checkpoint(directory)
    for changes in ({"files": {}}, {"step": 4}, {"files": files | {"x": {}}}):
        rewrite(directory, **changes)
        with pytest.raises(CheckpointError, match="cannot be understood"):
            read_checkpoint(directory)
    rewrite(directory, files=files, step=3, format=99)
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        read_checkpoint(directory)


def test_shares_of_the_files_are_checked_apart(tmp_path: Path) -> None:
    directory = save(tmp_path, 3)
    (directory / "state.json").write_bytes(b'{"a": 2}')
    found: list[str] = []
    for index in range(3):
        try:
            check_checkpoint(directory, share=(index, 3))
        except CheckpointError as error:
            found.append(error.message)
    [message] = found
    assert message.endswith("is damaged: state.json is not what was written")


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, False, {4}), (2, False, {3, 4}), (1, True, {2, 4}), (9, True, {1, 2, 3, 4})],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep_last: int, keep_best: bool, kept: set[int]
) -> None:
    losses = {1: 2.0, 2: 1.0, 3: 1.5, 4: None}
    saved = [read_checkpoint(save(tmp_path, s, eval_loss=loss)) for s, loss in losses.items()]
    assert choose_kept(saved, keep_last=keep_last, keep_best=keep_best) == kept


def test_the_base_is_identified_by_its_content() -> None:
    model = {"sha256": "ab", "revision": "c", "source": "hub", "directory": "/somewhere"}
    identity = base_identity({"inputs": {"model": model}})
    assert identity == {"sha256": "ab", "revision": "c", "source": "hub"}
    assert base_identity({}) == {"sha256": None, "revision": None, "source": None}
