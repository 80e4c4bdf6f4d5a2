"""The manifest of a checkpoint: what was saved, and how to tell that every byte is there.

A checkpoint is a directory ``step-00000100``: a safetensors file per rank, ``index.json`` (which
part of which tensor is in which file), ``state.json`` (all that is no tensor) and
``manifest.json``, written last, with size and sha256 of the others and of itself. It is built as
``.step-00000100.partial`` and renamed when all of it is on disk. No file is a pickle: a checkpoint
of a stranger can be damaged or wrong, and cannot run code.

Both halves read it: the launcher to choose and to compare, the ranks to check what they load.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import CheckpointError
from fsdpq.run_files.writing import sync, write_whole

FORMAT = 1
"""Version of the files' layout."""

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
STATE_NAME = "state.json"

MAX_JSON_BYTES = 1 << 28

_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READ_BYTES = 1 << 20

REMEDY = "delete that directory: the checkpoint before it is used then"


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint.

    Attributes:
        num_bytes: its size.
        sha256: of its content, in hex.
    """

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """What ``manifest.json`` says.

    Attributes:
        step: optimizer steps that were done.
        tokens: tokens of the rows trained on, all ranks.
        world_size: ranks that saved it.
        eval_loss: held-out loss after that step, None where it was not computed then.
        created: seconds since the epoch.
        recipe: the resolved recipe, as plain JSON data.
        data_digest: of the rows and their order.
        base: what identifies the base: ``sha256``, ``revision`` and ``source`` of the lock's
            ``inputs.model``.
        files: name in the directory -> size and hash.
    """

    step: int
    tokens: int
    world_size: int
    eval_loss: float | None
    created: float
    recipe: dict[str, Any]
    data_digest: str
    base: dict[str, Any]
    files: dict[str, SavedFile]

    @property
    def num_bytes(self) -> int:
        """Size of all its files but the manifest."""
        return sum(file.num_bytes for file in self.files.values())


def step_directory(folder: Path, step: int) -> Path:
    """Returns where the checkpoint after ``step`` lies in the folder of checkpoints."""
    return folder / f"step-{step:08d}"


def draft_directory(directory: Path) -> Path:
    """Returns where the checkpoint ``directory`` is built."""
    return directory.with_name(f".{directory.name}.partial")


def step_of(directory: Path) -> int:
    """Returns the step that a checkpoint's directory is named after, -1 for another name."""
    found = _STEP.fullmatch(directory.name)
    return int(found[1]) if found else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the directories of checkpoints, newest first; they may be damaged."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def list_drafts(folder: Path) -> list[Path]:
    """Returns what killed or failed saves, and interrupted deletions, left behind."""
    if not folder.is_dir():
        return []
    return sorted(folder.glob(".step-*.partial"))


def base_identity(lock: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what identifies the base in the content of ``run.lock.json``."""
    model = lock.get("inputs", {}).get("model", {})
    return {name: model.get(name) for name in ("sha256", "revision", "source")}


def write_manifest(directory: Path, saved: SavedCheckpoint) -> None:
    """Writes ``manifest.json`` into a draft: after everything else is on disk.

    Raises:
        OSError: the disk refuses.
    """
    content = {"format": FORMAT, **dataclasses.asdict(saved)}
    document = {**content, "sha256": _digest(content)}
    write_whole(directory / MANIFEST_NAME, _encode(document))
    sync(directory)


def read_checkpoint(directory: Path) -> SavedCheckpoint:
    """Returns the manifest of a checkpoint; its other files are not read.

    Raises:
        CheckpointError: it is missing or damaged, or of another version; names the file.
    """
    raw = _read_bytes(directory, MANIFEST_NAME)
    document = _decode(directory, MANIFEST_NAME, raw)
    try:
        is_whole = raw == _encode(document)  # blanks and the order of keys included
        sha256 = document.pop("sha256")
        found = document["format"]
        is_whole = is_whole and sha256 == _digest(document)
        if is_whole and found == FORMAT:
            return _parse(directory, document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(directory, f"{MANIFEST_NAME} cannot be understood") from error
    if is_whole:
        message = f"the checkpoint {directory} has format {found}, this version reads {FORMAT}"
        raise CheckpointError(message, hint="use the version of fsdpq that wrote it")
    raise damaged(directory, f"{MANIFEST_NAME} is not what was written")


def check_checkpoint(directory: Path, *, share: tuple[int, int] = (0, 1)) -> SavedCheckpoint:
    """Reads every byte of a checkpoint and returns its manifest.

    Args:
        directory: of the checkpoint.
        share: ``(index, count)``: read only every ``count``-th file, from number ``index``.

    Raises:
        CheckpointError: a file is missing or is not what was written; names it.
    """
    saved = read_checkpoint(directory)
    index, count = share
    for name, file in sorted(saved.files.items())[index::count]:
        _check_file(directory, name, file)
    return saved


def read_document(directory: Path, name: str) -> dict[str, Any]:
    """Returns a JSON file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read or is no JSON object.
    """
    return _decode(directory, name, _read_bytes(directory, name))


def damaged(directory: Path, what: str) -> CheckpointError:
    """Returns the error for a checkpoint that is not what was written."""
    return CheckpointError(f"the checkpoint {directory} is damaged: {what}", hint=REMEDY)


def choose_kept(
    checkpoints: Sequence[SavedCheckpoint], *, keep_last: int, keep_best: bool
) -> set[int]:
    """Returns the steps of the checkpoints that are not to be deleted.

    Args:
        checkpoints: all there are.
        keep_last: how many of the newest are kept.
        keep_best: also keep the one with the lowest held-out loss.
    """
    steps = sorted((saved.step for saved in checkpoints), reverse=True)
    kept = set(steps[: max(1, keep_last)])
    evaluated = [saved for saved in checkpoints if saved.eval_loss is not None]
    if keep_best and evaluated:
        kept.add(min(evaluated, key=lambda saved: (saved.eval_loss, -saved.step)).step)
    return kept


def _check_file(directory: Path, name: str, file: SavedFile) -> None:
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with (directory / name).open("rb") as opened:
            while chunk := opened.read(_READ_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    except OSError as error:
        raise damaged(directory, f"{name} cannot be read: {error.strerror or error}") from error
    if num_bytes != file.num_bytes:
        raise damaged(directory, f"{name} has {num_bytes} bytes instead of {file.num_bytes}")
    if digest.hexdigest() != file.sha256:
        raise damaged(directory, f"{name} is not what was written")


def _read_bytes(directory: Path, name: str) -> bytes:
    try:
        with (directory / name).open("rb") as file:
            return file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise damaged(directory, f"{name} cannot be read: {error.strerror or error}") from error


def _decode(directory: Path, name: str, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise damaged(directory, f"{name} cannot be understood") from error
    if not isinstance(document, dict):
        raise damaged(directory, f"{name} is not what was written")
    return cast("dict[str, Any]", document)


def _encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _parse(directory: Path, document: Mapping[str, Any]) -> SavedCheckpoint:
    names = {field.name for field in dataclasses.fields(SavedCheckpoint)}
    content = {name: document[name] for name in names}
    if not all(_FILE.fullmatch(name) for name in content["files"]):
        raise ValueError("a file's name is none")
    content["files"] = {name: SavedFile(**file) for name, file in content["files"].items()}
    saved = SavedCheckpoint(**content)
    if saved.step != step_of(directory) or not {INDEX_NAME, STATE_NAME} <= saved.files.keys():
        raise ValueError("step or files do not fit")
    return saved


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
