"""Prepared data: token ids and masks in memory-mapped files, read-only and shared by all ranks.

Documents lie there once, in the order in which they were read. A row of training is a list of
document numbers: one document, or those of a packed sequence. So packing and mixing write indices
only, a document that a mixture repeats takes no room, and a rank touches only the pages of the rows
that it trains on. `fsdpq.rows.prepared_files` has the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast, overload

import numpy as np
import numpy.typing as npt

from fsdpq.data.text.tokenize import Row
from fsdpq.rows.prepared_files import (
    ITEM_BYTES,
    SPLITS,
    PreparedManifest,
    StoredFile,
    check_sizes,
    damaged,
    read_manifest,
    write_manifest,
)
from fsdpq.rows.report import DataReport
from fsdpq.run_files.writing import sync

Int64 = npt.NDArray[np.int64]
_DTYPES = {4: np.dtype("<i4"), 1: np.dtype("u1"), 8: np.dtype("<i8")}


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, one after another.

    Attributes:
        tokens: token ids of all of them, int32.
        mask: for each token whether predicting it carries loss, uint8.
        offsets: where each begins, and the end of the last one, ``(documents + 1,)``.
        trained: tokens of each that carry loss, ``(documents,)``.
        origins: source of each, and its row's number in it, ``(documents, 2)``.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    offsets: Int64
    trained: Int64
    origins: Int64

    def __len__(self) -> int:
        return len(self.trained)

    @property
    def lengths(self) -> Int64:
        """Tokens of each document."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RowIndex:
    """Which documents make up each row.

    Attributes:
        rows: where each row begins in ``documents``, and the end of the last, ``(rows + 1,)``.
        documents: numbers of documents.
    """

    rows: Int64
    documents: Int64

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows) - 1

    @classmethod
    def of_documents(cls, documents: npt.ArrayLike) -> RowIndex:
        """Returns rows of one document each."""
        numbers = np.asarray(documents, dtype=np.int64)
        return cls(np.arange(len(numbers) + 1, dtype=np.int64), numbers)

    @classmethod
    def of_sequences(cls, sequences: Sequence[Int64]) -> RowIndex:
        """Returns rows of several documents."""
        sizes = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
        documents = np.concatenate(sequences) if sequences else np.zeros(0, np.int64)
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), documents)


class PreparedRows(Sequence[Row]):
    """Rows of prepared data; a row is read when it is asked for.

    Rows of one document are views into the map, packed ones are copies.

    Args:
        documents: all documents.
        index: which of them make up each row.
        packed: rows are sequences of documents that do not see each other.
    """

    def __init__(self, documents: Documents, index: RowIndex, *, packed: bool) -> None:
        self._documents, self._index, self._packed = documents, index, packed

    def __len__(self) -> int:
        return self._index.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        numbers = self.documents_of(index)
        offsets = self._documents.offsets
        spans = [slice(int(offsets[n]), int(offsets[n + 1])) for n in numbers]
        tokens = [self._documents.tokens[span] for span in spans]
        masks = [self._documents.mask[span] for span in spans]
        lengths = tuple(span.stop - span.start for span in spans) if self._packed else ()
        if len(spans) == 1:
            return Row(_plain(tokens[0]), _plain(masks[0]), lengths)
        return Row(_plain(np.concatenate(tokens)), _plain(np.concatenate(masks)), lengths)

    def documents_of(self, row: int) -> Int64:
        """Returns the numbers of the documents that make up a row."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        start = row % len(self)
        return self._index.documents[self._index.rows[start] : self._index.rows[start + 1]]

    @property
    def documents(self) -> Documents:
        """All documents, of other rows too."""
        return self._documents

    @property
    def packed(self) -> bool:
        """Whether rows are sequences of documents."""
        return self._packed

    @property
    def lengths(self) -> Int64:
        """Tokens of each row, ``(rows,)``; no token is read for it."""
        return self._sum(self._documents.lengths)

    @property
    def num_trained(self) -> Int64:
        """Tokens of each row that carry loss, ``(rows,)``; no token is read for it."""
        return self._sum(self._documents.trained)

    def _sum(self, per_document: Int64) -> Int64:
        sums = np.concatenate([[0], np.cumsum(per_document[self._index.documents])])
        return np.diff(sums[self._index.rows]).astype(np.int64)


@dataclass(frozen=True)
class PreparedData:
    """Everything that a run trains on and evaluates.

    Attributes:
        train: rows of one epoch.
        held_out: rows for evaluation, maybe none.
        report: what was done to the rows.
        digest: equal for equal data, to compare over ranks.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    report: DataReport
    digest: str


def open_prepared(directory: Path) -> PreparedData:
    """Maps prepared data, read-only.

    Raises:
        DamagedDataError: a file is missing, has another size than was written, or does not fit
            the others.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    documents = Documents(
        cast("npt.NDArray[np.int32]", _map(directory, "tokens.bin")),
        cast("npt.NDArray[np.uint8]", _map(directory, "mask.bin")),
        cast("Int64", _map(directory, "documents.bin")),
        cast("Int64", _map(directory, "trained.bin")),
        cast("Int64", _map(directory, "origins.bin")).reshape(-1, 2),
    )
    train, held_out = (_open_rows(directory, split, documents, manifest) for split in SPLITS)
    return PreparedData(train, held_out, manifest.report, manifest.digest)


class PreparedWriter:
    """Writes prepared data into an empty directory, documents first, in order.

    Memory: what it is given, and 32 bytes a document.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = {name: _HashedFile(directory / name) for name in ITEM_BYTES}
        self._num_tokens = 0
        self._lengths: list[Int64] = []
        self._trained: list[Int64] = []
        self._files["documents.bin"].write(np.zeros(1, np.int64))

    def add(self, rows: Documents) -> None:
        """Appends documents; their offsets may begin anywhere."""
        self._lengths.append(rows.lengths)
        self._trained.append(rows.trained)
        offsets = np.cumsum(rows.lengths) + self._num_tokens
        self._num_tokens += len(rows.tokens)
        self._files["tokens.bin"].write(rows.tokens)
        self._files["mask.bin"].write(rows.mask)
        self._files["documents.bin"].write(offsets)
        self._files["trained.bin"].write(rows.trained)
        self._files["origins.bin"].write(rows.origins)

    def lengths(self) -> Int64:
        """Returns the tokens of each document so far."""
        return np.concatenate([np.zeros(0, np.int64), *self._lengths])

    def trained(self) -> Int64:
        """Returns the tokens of each document so far that carry loss."""
        return np.concatenate([np.zeros(0, np.int64), *self._trained])

    def finish(
        self,
        *,
        train: RowIndex,
        held_out: RowIndex,
        packed: bool,
        report: DataReport,
        key: Mapping[str, Any],
    ) -> None:
        """Writes the rows and, last, the manifest."""
        for split, index in zip(SPLITS, (train, held_out), strict=True):
            self._files[f"{split}.rows.bin"].write(index.rows)
            self._files[f"{split}.documents.bin"].write(index.documents)
        files = {name: file.finish() for name, file in self._files.items()}
        write_manifest(self._directory, PreparedManifest(key, packed, report, files))

    def close(self) -> None:
        """Closes the files; without `finish` they are not prepared data."""
        for file in self._files.values():
            file.close()


def join_documents(rows: Iterable[Row], origins: npt.ArrayLike) -> Documents:
    """Returns single rows as documents, in order.

    Args:
        rows: one document each.
        origins: source and row number of each, ``(rows, 2)``.
    """
    ids = [np.asarray(row.input_ids, dtype=np.int32) for row in rows]
    masks = [_mask_of(row) for row in rows]
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    trained = np.fromiter((np.count_nonzero(mask) for mask in masks), np.int64, len(ids))
    return Documents(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(masks) if masks else np.zeros(0, np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        trained,
        np.asarray(origins, dtype=np.int64).reshape(-1, 2),
    )


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._dtype = _DTYPES[ITEM_BYTES[path.name]]

    def write(self, items: npt.NDArray[Any]) -> None:
        if items.size == 0:
            return
        raw = np.ascontiguousarray(items, dtype=self._dtype).data.cast("B")
        self._file.write(raw)
        self._digest.update(raw)
        self._num_bytes += len(raw)

    def finish(self) -> StoredFile:
        self._file.close()
        sync(self._path)
        return StoredFile(self._num_bytes, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()


def _map(directory: Path, name: str) -> npt.NDArray[Any]:
    dtype, path = _DTYPES[ITEM_BYTES[name]], directory / name
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype)
    try:
        return np.memmap(path, dtype, mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise damaged(directory, f"`{name}` cannot be mapped: {error}") from error


def _open_rows(
    directory: Path, split: str, documents: Documents, manifest: PreparedManifest
) -> PreparedRows:
    rows, numbers = (_map(directory, f"{split}.{part}.bin") for part in ("rows", "documents"))
    fits = len(rows) and rows[-1] == len(numbers) and len(documents.offsets) == len(documents) + 1
    if not fits or documents.offsets[-1] != len(documents.tokens):
        raise damaged(directory, f"the files of `{split}` do not fit together")
    return PreparedRows(documents, RowIndex(rows, numbers), packed=manifest.packed)


def _mask_of(row: Row) -> npt.NDArray[np.uint8]:
    mask: Any = row.loss_mask
    if isinstance(mask, bytes | bytearray):
        return np.frombuffer(mask, np.uint8)
    return np.asarray(mask).astype(np.uint8)


def _plain(array: npt.NDArray[Any]) -> Any:
    """Returns ``array`` as it is, of the type that `Row` takes."""
    return array
