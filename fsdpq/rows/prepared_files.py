"""The files of prepared data and their manifest: what they were made from, what they hold.

Prepared data is a directory of plain arrays, little endian, without headers:

    tokens.bin      int32, the token ids of all documents, one after another
    mask.bin        uint8, for each token whether predicting it carries loss
    documents.bin   int64, where each document begins in tokens.bin, and the end of the last one
    trained.bin     int64, tokens of each document that carry loss
    origins.bin     int64, two a document: its source, and its row's number in it
    train.rows.bin, train.documents.bin, held_out.rows.bin, held_out.documents.bin
                    int64: row ``i`` is made of the documents with the numbers
                    ``documents[rows[i]:rows[i + 1]]``

``prepared.json`` is the manifest, written last: a directory without it is what a killed writer
left. Both halves read it, the launcher to choose, the ranks to check what they map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fsdpq.errors import DamagedDataError
from fsdpq.rows.report import DataReport
from fsdpq.run_files.writing import sync, write_whole

FORMAT = 1
"""Version of the files' layout; part of the key."""

MANIFEST_NAME = "prepared.json"
MAX_MANIFEST_BYTES = 1 << 24

SPLITS = ("train", "held_out")

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "tokens.bin": 4,
        "mask.bin": 1,
        "documents.bin": 8,
        "trained.bin": 8,
        "origins.bin": 8,
        **{f"{split}.{part}.bin": 8 for split in SPLITS for part in ("rows", "documents")},
    }
)
"""The files -> bytes of one item."""


@dataclass(frozen=True)
class StoredFile:
    """One array on disk.

    Attributes:
        num_bytes: its size.
        sha256: of its content.
    """

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PreparedManifest:
    """What ``prepared.json`` says.

    Attributes:
        key: what the data was made from.
        packed: rows are sequences of documents that do not see each other.
        report: what was done to the rows.
        files: name -> size and hash, all of `ITEM_BYTES`.
    """

    key: Mapping[str, Any]
    packed: bool
    report: DataReport
    files: Mapping[str, StoredFile]

    @property
    def digest(self) -> str:
        """One hash for the rows: equal for equal rows, wherever they came from."""
        hashes = {name: file.sha256 for name, file in self.files.items()}
        return _digest({"packed": self.packed, "files": hashes})


def is_prepared(directory: Path) -> bool:
    """Whether ``directory`` has a manifest: its writer came to the end."""
    return (directory / MANIFEST_NAME).is_file()


def write_manifest(directory: Path, manifest: PreparedManifest) -> None:
    """Writes ``prepared.json``, after everything else is on disk."""
    content = {
        "format": FORMAT,
        "key": dict(manifest.key),
        "packed": manifest.packed,
        "report": manifest.report.as_json(),
        "files": {name: asdict(file) for name, file in manifest.files.items()},
    }
    document = {**content, "sha256": _digest(content)}
    write_whole(directory / MANIFEST_NAME, (json.dumps(document, indent=2) + "\n").encode())
    sync(directory)


def read_manifest(directory: Path) -> PreparedManifest:
    """Returns the manifest of prepared data.

    Raises:
        DamagedDataError: there is none, or it is not what was written.
    """
    try:
        with (directory / MANIFEST_NAME).open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise damaged(directory, f"`{MANIFEST_NAME}` cannot be read: {error.strerror}") from error
    try:
        content: dict[str, Any] = json.loads(raw)
        digest = content.pop("sha256")
        if content["format"] == FORMAT and digest == _digest(content):
            return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(directory, f"`{MANIFEST_NAME}` cannot be understood") from error
    raise damaged(directory, f"`{MANIFEST_NAME}` is not what was written")


def check_sizes(directory: Path, manifest: PreparedManifest) -> None:
    """Checks that every file is there with its size.

    Raises:
        DamagedDataError: one is missing or has another.
    """
    for name, file in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise damaged(directory, f"`{name}` cannot be read: {error.strerror}") from error
        if size != file.num_bytes:
            raise damaged(directory, f"`{name}` has {size} bytes instead of {file.num_bytes}")


def damaged(directory: Path, what: str) -> DamagedDataError:
    """Returns the error for prepared data that is not what was written."""
    hint = f"delete {directory}: the next run makes it again"
    return DamagedDataError(f"the prepared data {directory} is damaged: {what}", hint=hint)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(content: Mapping[str, Any]) -> PreparedManifest:
    files = {name: StoredFile(**content["files"][name]) for name in ITEM_BYTES}
    report = DataReport.from_json(content["report"])
    return PreparedManifest(content["key"], bool(content["packed"]), report, files)
