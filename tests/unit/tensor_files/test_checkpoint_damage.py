"""Every damage of every file of a checkpoint is found, and the message names directory and file.

That the checkpoint before it is used then, by real ranks, is in ``tests/dist``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import CheckpointError
from fsdpq.tensor_files import checkpoint_manifest
from fsdpq.tensor_files.checkpoint_manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    STATE_NAME,
    SavedCheckpoint,
    SavedFile,
    check_checkpoint,
    list_checkpoints,
    list_drafts,
    step_directory,
    write_manifest,
)

TENSORS = ("rank-00000.safetensors", "rank-00001.safetensors")
FILES = (MANIFEST_NAME, INDEX_NAME, STATE_NAME, *TENSORS)
BEFORE, NEWEST = 20, 40


def save(folder: Path, step: int, *, seed: int = 0) -> Path:
    """Writes a checkpoint of made-up content; that of the index is always the same."""
    rng = random.Random(f"{step} {seed}")
    directory = step_directory(folder, step)
    directory.mkdir(parents=True)
    contents = {name: rng.randbytes(3000) for name in TENSORS}
    contents[INDEX_NAME] = json.dumps({"tensors": {}}).encode()
    contents[STATE_NAME] = json.dumps({"step": step, "loss": rng.random()}).encode()
    files: dict[str, SavedFile] = {}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        files[name] = SavedFile(len(content), hashlib.sha256(content).hexdigest())
    saved = SavedCheckpoint(
        step=step, tokens=100, world_size=2, eval_loss=1.5, created=0.0,
        recipe={"name": "tiny", "training": {"seed": seed}}, data_digest="d", base={}, files=files,
    )  # fmt: skip
    write_manifest(directory, saved)
    return directory


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newer of two whole checkpoints."""
    save(tmp_path, BEFORE)
    return save(tmp_path, NEWEST)


def flip(path: Path, position: int, bit: int) -> None:
    """Turns one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, num_bytes: int) -> None:
    """Leaves the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:num_bytes])


def damages(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yields every damage of a file, by name."""
    size = path.stat().st_size
    for length in (0, 1, size // 2, size - 1):
        yield f"cut to {length}", functools.partial(cut, num_bytes=length)
    for position in (0, 7, size // 2, size - 2, size - 1):
        yield f"bit of {position}", functools.partial(flip, position=position, bit=position % 8)
    yield "a byte more", lambda path: path.write_bytes(path.read_bytes() + b"\0")
    yield "a blank more", lambda path: path.write_bytes(path.read_bytes() + b"\n")
    yield "zeros", lambda path: path.write_bytes(bytes(path.stat().st_size))
    yield "missing", Path.unlink
    yield "a directory", lambda path: (path.unlink(), path.mkdir())
    yield "a link to nothing", lambda path: (path.unlink(), path.symlink_to("nowhere"))
    older = step_directory(path.parent.parent, BEFORE) / path.name
    if older.read_bytes() != path.read_bytes():
        yield "of another step", lambda path: shutil.copyfile(older, path)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_found_and_named(newest: Path, name: str) -> None:
    path = newest / name
    intact = path.read_bytes()
    for what, damage in list(damages(path)):
        damage(path)
        with pytest.raises(CheckpointError) as refused:
            check_checkpoint(newest)
        assert name in refused.value.message, what
        assert str(newest) in refused.value.message, what
        assert "the checkpoint before it" in refused.value.hint, what
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(intact)
    assert check_checkpoint(newest).step == NEWEST


def test_no_flipped_bit_goes_by_unseen(newest: Path) -> None:
    rng = random.Random(7)
    for _ in range(1000):
        path = newest / rng.choice(FILES)
        intact = path.read_bytes()
        flip(path, rng.randrange(len(intact)), rng.randrange(8))
        with pytest.raises(CheckpointError, match=path.name):
            check_checkpoint(newest)
        path.write_bytes(intact)


def test_files_that_changed_places_are_found(newest: Path) -> None:
    first, second = (newest / name for name in TENSORS)
    first.rename(newest / "third")
    second.rename(first)
    (newest / "third").rename(second)
    for share in ((0, 2), (1, 2)):  # each rank reads its part of the files
        with pytest.raises(CheckpointError, match=r"rank-0000\d"):
            check_checkpoint(newest, share=share)


def test_directories_that_changed_places_are_found(newest: Path) -> None:
    before = step_directory(newest.parent, BEFORE)
    newest.rename(newest.parent / "third")
    before.rename(newest)
    (newest.parent / "third").rename(before)
    for directory in (newest, before):
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            check_checkpoint(directory)


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and its own hash, as someone who knows how could."""
    document = json.loads((directory / MANIFEST_NAME).read_text())
    del document["sha256"]
    change(document)
    document["sha256"] = checkpoint_manifest._digest(document)  # pyright: ignore
    (directory / MANIFEST_NAME).write_text(json.dumps(document, indent=1) + "\n")


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another step": lambda document: document.update(step=3),
    "a later format": lambda document: document.update(format=99),
    "no files": lambda document: document.update(files={}),
    "a file elsewhere": lambda document: document["files"].update(
        {"../outside": document["files"][INDEX_NAME]}
    ),
    "a field less": lambda document: document.pop("recipe"),
    "files as a list": lambda document: document.update(files=[]),
    "another hash": lambda document: document["files"][INDEX_NAME].update(sha256="0" * 64),
    "another size": lambda document: document["files"][INDEX_NAME].update(num_bytes=1),
    "a file that is none": lambda document: document["files"].update({"x": 5}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_was_written_anew_is_no_way_around(newest: Path, edit: str) -> None:
    rewrite_manifest(newest, EDITS[edit])
    with pytest.raises(CheckpointError, match=str(newest)):
        check_checkpoint(newest)


def test_a_manifest_may_hold_anything(newest: Path) -> None:
    for text in ("[" * 5000, '{"a":' * 900 + "1" + "}" * 900, "null", '"x"', "{}", "[1]", "1e999"):
        (newest / MANIFEST_NAME).write_text(text)
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            check_checkpoint(newest)


def test_what_lies_about_is_no_checkpoint(newest: Path) -> None:
    folder = newest.parent
    shutil.copytree(newest, folder / ".step-00000060.partial")  # killed before it was renamed
    shutil.copytree(newest, folder / "step-00000040 (copy)")
    (newest / "notes.txt").write_text("mine")
    (folder / "step-00000100").write_text("a file")
    assert list_checkpoints(folder) == [newest, step_directory(folder, BEFORE)]
    assert list_drafts(folder) == [folder / ".step-00000060.partial"]
    assert check_checkpoint(newest).step == NEWEST
    step_directory(folder, 99).mkdir()
    assert list_checkpoints(folder)[0] == step_directory(folder, 99)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        check_checkpoint(step_directory(folder, 99))
