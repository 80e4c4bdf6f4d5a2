"""Prepared data on disk: what is written comes back, from files that nobody else can change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fsdpq.data.preparing.prepared import (
    Documents,
    PreparedData,
    PreparedRows,
    PreparedWriter,
    RowIndex,
    join_documents,
    open_prepared,
)
from fsdpq.data.text.tokenize import Row
from fsdpq.errors import DamagedDataError
from fsdpq.rows.prepared_files import ITEM_BYTES, MANIFEST_NAME
from fsdpq.rows.report import DataReport, SourceCounts

REPORT = DataReport(512, (SourceCounts("rows.jsonl", num_rows=40),), fill=0.5, lengths={"50": 3})


def _documents(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Returns ids and masks of made-up documents, lists of plain numbers."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(random.integers(1, 400))
        mask = random.integers(0, 2, length)
        mask[0] = 0
        found.append((random.integers(0, 150_000, length).tolist(), mask.tolist()))
    return found


def _write(
    directory: Path,
    documents: list[tuple[list[int], list[int]]],
    train: RowIndex,
    held_out: RowIndex,
    *,
    packed: bool = False,
    chunk: int = 7,
) -> PreparedData:
    directory.mkdir()
    writer = PreparedWriter(directory)
    for start in range(0, len(documents), chunk):
        part = documents[start : start + chunk]
        rows = [Row(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in part]
        writer.add(join_documents(rows, [(0, start + i + 1) for i in range(len(part))]))
    writer.finish(train=train, held_out=held_out, packed=packed, report=REPORT, key={"a": 1})
    return open_prepared(directory)


def test_documents_come_back_as_they_were_given(tmp_path: Path) -> None:
    documents = _documents(0, 40)
    train, held_out = [3, 0, 39, 3, 12], [7, 8]
    data = _write(
        tmp_path / "d", documents, RowIndex.of_documents(train), RowIndex.of_documents(held_out)
    )
    for rows, numbers in ((data.train, train), (data.held_out, held_out)):
        assert len(rows) == len(numbers)
        for row, number in zip(rows, numbers, strict=True):
            assert list(row.input_ids) == documents[number][0]
            assert list(row.loss_mask) == documents[number][1]
            assert row.document_lengths == ()
    assert isinstance(data.train, PreparedRows)
    assert data.train.lengths.tolist() == [len(documents[n][0]) for n in train]
    assert data.train.num_trained.tolist() == [sum(documents[n][1]) for n in train]
    assert data.train.documents.origins.tolist() == [[0, n + 1] for n in range(40)]
    assert data.report == REPORT


def test_packed_rows_join_their_documents_in_order(tmp_path: Path) -> None:
    documents = _documents(1, 20)
    sequences = [np.array([5, 2]), np.array([19]), np.array([0, 1, 18])]
    index = RowIndex.of_sequences(sequences)
    none = RowIndex.of_sequences([])
    data = _write(tmp_path / "d", documents, index, none, packed=True)
    assert len(data.held_out) == 0
    for row, numbers in zip(data.train, sequences, strict=True):
        assert list(row.input_ids) == [token for n in numbers for token in documents[n][0]]
        assert list(row.loss_mask) == [flag for n in numbers for flag in documents[n][1]]
        assert row.document_lengths == tuple(len(documents[n][0]) for n in numbers)
    assert [len(row.input_ids) for row in data.train[1:]] == [
        sum(len(documents[n][0]) for n in numbers) for numbers in sequences[1:]
    ]
    with pytest.raises(IndexError):
        data.train[3]


def test_chunks_do_not_change_a_byte(tmp_path: Path) -> None:
    documents, index = _documents(2, 30), RowIndex.of_documents(range(30))
    first = _write(tmp_path / "a", documents, index, index, chunk=1)
    second = _write(tmp_path / "b", documents, index, index, chunk=30)
    assert first.digest == second.digest
    for name in (*ITEM_BYTES, MANIFEST_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_token_gives_another_digest(tmp_path: Path) -> None:
    documents, index = _documents(2, 3), RowIndex.of_documents(range(3))
    first = _write(tmp_path / "a", documents, index, index)
    documents[1][0][0] += 1
    assert _write(tmp_path / "b", documents, index, index).digest != first.digest


def test_rows_cannot_be_written_to(tmp_path: Path) -> None:
    index = RowIndex.of_documents([0])
    [row] = _write(tmp_path / "d", _documents(3, 1), index, index).train
    ids = row.input_ids
    assert isinstance(ids, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 0


@pytest.mark.parametrize("name", ["tokens.bin", "train.rows.bin", "origins.bin"])
def test_truncated_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    index = RowIndex.of_documents([0, 1])
    _write(tmp_path / "d", _documents(4, 2), index, index)
    path = tmp_path / "d" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = f"`{name}` has {len(whole) - 1} bytes instead of {len(whole)}"
    with pytest.raises(DamagedDataError, match=message) as caught:
        open_prepared(tmp_path / "d")
    assert str(tmp_path / "d") in caught.value.hint
    path.unlink()
    with pytest.raises(DamagedDataError, match=f"`{name}` cannot be read"):
        open_prepared(tmp_path / "d")


def test_edited_manifest_is_noticed(tmp_path: Path) -> None:
    index = RowIndex.of_documents([0])
    _write(tmp_path / "d", _documents(5, 1), index, index)
    path = tmp_path / "d" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["report"]["num_tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedDataError, match="is not what was written"):
        open_prepared(tmp_path / "d")
    path.write_text("{")
    with pytest.raises(DamagedDataError, match="cannot be understood"):
        open_prepared(tmp_path / "d")


def test_no_documents_are_no_rows() -> None:
    empty = join_documents([], [])
    assert isinstance(empty, Documents)
    assert len(empty) == 0
    assert len(PreparedRows(empty, RowIndex.of_documents([]), packed=False)) == 0
