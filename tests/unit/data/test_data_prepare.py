"""Preparing data: the tokens are transformers', every row is accounted for, processes do not show.

Reference: ``apply_chat_template`` of transformers, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tokenizer import CHATML, build_tokenizer

from fsdpq.data.preparing import row_chunks
from fsdpq.data.preparing.prepare import Preparation, prepare_data
from fsdpq.data.preparing.prepared import PreparedData, PreparedRows, open_prepared
from fsdpq.errors import RecipeError
from fsdpq.fetch.hashes import hash_file
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.prepared_files import ITEM_BYTES, MANIFEST_NAME
from fsdpq.rows.report import DataReport
from fsdpq.rows.source import DataSources, RowSource, SourceFile

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "red", "green", "blue"]
REFUSES_RED = CHATML.replace(
    "{% for m in messages %}",
    "{% if 'red' in messages[0].content %}{{ raise_exception('no red here') }}{% endif %}"
    "{% for m in messages %}",
)


def _rows(count: int, seed: int, longest: int = 30) -> list[list[dict[str, str]]]:
    random = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(random.choice(WORDS, int(random.integers(1, longest))))

    return [
        [
            {"role": "user", "content": f"{seed} {index} {text()}"},
            {"role": "assistant", "content": text()},
        ]
        for index in range(count)
    ]


def _source(path: Path, rows: Sequence[Any], **fields: Any) -> RowSource:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    file = SourceFile(path, hash_file(path))
    return RowSource(str(path), (file,), "messages", len(rows), **fields)


def _prepare(
    directory: Path,
    sources: RowSource | DataSources,
    *,
    template: str = CHATML,
    processes: int = 1,
    seed: int = 5,
    **options: Any,
) -> tuple[PreparedData, DataReport]:
    directory.mkdir()
    one = DataSources((sources,)) if isinstance(sources, RowSource) else sources
    job = Preparation(
        one, DataOptions(**{"seq_len": 256} | options), build_tokenizer(template=template), seed,
        num_processes=processes,
    )  # fmt: skip
    report = prepare_data(job, directory, key={})
    data = open_prepared(directory)
    assert data.report == report
    return data, report


def _origins(rows: Any) -> list[tuple[int, int]]:
    """Returns source and row number of every document of every row."""
    assert isinstance(rows, PreparedRows)
    numbers = [number for row in range(len(rows)) for number in rows.documents_of(row).tolist()]
    return [tuple(rows.documents.origins[number].tolist()) for number in numbers]


def _reference_ids(row: Any) -> list[int]:
    found: Any = build_tokenizer().apply_chat_template(row, return_dict=True)
    return list(found["input_ids"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_ROWS", 7)


def test_tokens_are_those_of_transformers_and_every_row_is_there_once(tmp_path: Path) -> None:
    rows = _rows(50, 0)
    source = _source(tmp_path / "rows.jsonl", rows)
    data, report = _prepare(tmp_path / "d", source, eval_fraction=0.2, packing="best_fit")
    assert sorted(_origins(data.train) + _origins(data.held_out)) == [(0, n + 1) for n in range(50)]
    for split in (data.train, data.held_out):
        assert isinstance(split, PreparedRows)
        for index, row in enumerate(split):
            expected = [
                _reference_ids(rows[number - 1])
                for _, number in split.documents.origins[split.documents_of(index)].tolist()
            ]
            assert row.document_lengths == tuple(map(len, expected))
            assert list(row.input_ids) == [token for ids in expected for token in ids]
    assert len(data.held_out) == report.num_held_out_sequences
    assert (report.num_train_rows, report.num_held_out) == (40, 10)
    assert report.num_tokens == sum(len(row) for row in data.train)
    assert report.num_trained == sum(row.num_trained for row in data.train)
    assert report.fill == report.num_tokens / (len(data.train) * 256)
    lengths = sorted(len(_reference_ids(row)) for row in rows)
    assert (report.lengths["0"], report.lengths["50"], report.lengths["100"]) == (
        lengths[0], lengths[24], lengths[-1],
    )  # fmt: skip


def test_number_of_processes_does_not_change_a_byte(tmp_path: Path) -> None:
    source = _source(tmp_path / "rows.jsonl", _rows(60, 1))
    for processes in (1, 2, 3):
        _prepare(
            tmp_path / str(processes), source, processes=processes, eval_fraction=0.1, seq_len=64
        )
    for name in (*ITEM_BYTES, MANIFEST_NAME):
        contents = {(tmp_path / str(number) / name).read_bytes() for number in (1, 2, 3)}
        assert len(contents) == 1


def test_held_out_rows_depend_on_the_seed(tmp_path: Path) -> None:
    source = _source(tmp_path / "rows.jsonl", _rows(40, 1))
    found = [
        set(
            _origins(_prepare(tmp_path / str(n), source, seed=seed, eval_fraction=0.25)[0].held_out)
        )
        for n, seed in enumerate((5, 5, 6))
    ]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 10


def test_weights_repeat_no_held_out_row(tmp_path: Path) -> None:
    large = _source(tmp_path / "large.jsonl", _rows(40, 1), weight=1.0)
    small = _source(tmp_path / "small.jsonl", _rows(20, 2), weight=2.0)
    data, report = _prepare(
        tmp_path / "d", DataSources((large, small)),
        eval_fraction=0.25, mixture_stopping="all_exhausted",
    )  # fmt: skip
    train, held_out = _origins(data.train), _origins(data.held_out)
    assert not set(train) & set(held_out)
    assert len(held_out) == 15
    kept = [40 - report.sources[0].num_held_out, 20 - report.sources[1].num_held_out]
    used = [sum(source == number for source, _ in train) for number in (0, 1)]
    assert used == [kept[0], 2 * kept[0]]
    assert used == [source.num_used for source in report.sources]
    assert {train.count(row) for row in train if row[0] == 0} == {1}
    assert len({row for row in train if row[0] == 1}) == kept[1]


def test_parts_without_weights_are_all_used_once(tmp_path: Path) -> None:
    parts = tuple(_source(tmp_path / f"{n}.jsonl", _rows(9 + n, n)) for n in range(3))
    data, report = _prepare(tmp_path / "d", DataSources(parts))
    assert _origins(data.train) == [(n, row + 1) for n in range(3) for row in range(9 + n)]
    assert [source.num_used for source in report.sources] == [9, 10, 11]


def test_evaluation_rows_come_from_their_own_source(tmp_path: Path) -> None:
    sources = DataSources(
        (_source(tmp_path / "train.jsonl", _rows(9, 1)),),
        eval=_source(tmp_path / "eval.jsonl", _rows(4, 2)),
    )
    data, report = _prepare(tmp_path / "d", sources)
    assert _origins(data.train) == [(0, n + 1) for n in range(9)]
    assert _origins(data.held_out) == [(1, n + 1) for n in range(4)]
    assert report.eval is not None
    assert (report.eval.num_rows, report.eval.num_held_out, report.eval.num_used) == (4, 4, 0)
    assert report.sources[0].num_held_out == 0


@pytest.mark.parametrize("policy", ["truncate_end", "truncate_start", "drop"])
def test_long_rows_are_cut_or_left_out_and_counted(tmp_path: Path, policy: str) -> None:
    rows = _rows(30, 3, longest=60)
    ids = [_reference_ids(row) for row in rows]
    limit = sorted(map(len, ids))[20]
    source = _source(tmp_path / "rows.jsonl", rows)
    data, report = _prepare(tmp_path / "d", source, seq_len=limit, truncation=policy)
    [counts] = report.sources
    num_long = sum(len(row) > limit for row in ids)
    assert (counts.num_cut, counts.num_too_long) == (
        (0, num_long) if policy == "drop" else (num_long, 0)
    )
    assert counts.num_kept + counts.num_untrained + counts.num_too_long == 30
    for (_, number), row in zip(_origins(data.train), data.train, strict=True):
        whole = ids[number - 1]
        expected = whole[-limit:] if policy == "truncate_start" else whole[:limit]
        assert list(row.input_ids) == expected
        assert row.loss_mask[0] == 0
        assert row.num_trained


def test_too_long_rows_are_named_where_they_are_an_error(tmp_path: Path) -> None:
    rows = _rows(30, 3, longest=5)
    for index in (11, 25):
        rows[index][1]["content"] = "red " * 300
    source = _source(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        _prepare(tmp_path / "d", source, truncation="error")
    problems = caught.value.problems
    assert [problem.location.line for problem in problems if problem.location] == [12, 26]
    length = len(_reference_ids(rows[11]))
    assert problems[0].message == f"{length} tokens, and `data.seq_len` is 256"
    assert not (tmp_path / "d" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_the_template_refuses_are_named(tmp_path: Path, processes: int) -> None:
    rows = _rows(40, 4)
    for row in rows:
        row[0]["content"] = row[0]["content"].replace("red", "blue")
    for index in (2, 20, 39):
        rows[index][0]["content"] += " red"
    source = _source(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        _prepare(tmp_path / "d", source, template=REFUSES_RED, processes=processes)
    places = [(p.location.source, p.location.line) for p in caught.value.problems if p.location]
    assert places == [(str(tmp_path / "rows.jsonl"), line) for line in (3, 21, 40)]
    assert "no red here" in caught.value.problems[0].message
    data, report = _prepare(
        tmp_path / "skip", source, template=REFUSES_RED, on_bad_row="skip", processes=processes
    )
    assert (report.sources[0].num_rows, report.sources[0].num_bad) == (37, 3)
    assert (0, 3) not in _origins(data.train)


def test_rows_without_trained_tokens_are_left_out_and_none_left_is_an_error(tmp_path: Path) -> None:
    rows = _rows(6, 5)
    rows[3][0]["content"] = "red " * 100  # cut before its answer begins
    source = _source(tmp_path / "rows.jsonl", rows)
    data, report = _prepare(tmp_path / "d", source, seq_len=100)
    assert report.sources[0].num_untrained == 1
    assert (0, 4) not in _origins(data.train)
    for row in rows:
        row[0]["content"] = "red " * 100
    source = _source(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        _prepare(tmp_path / "none", source, seq_len=100)
    assert caught.value.problems[0].message == "none of the 6 rows has a token that carries loss"


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    source = _source(tmp_path / "rows.jsonl", _rows(1, 0))
    with pytest.raises(RecipeError) as caught:
        _prepare(tmp_path / "d", source, eval_fraction=0.5)
    assert caught.value.problems[0].message == "one row cannot be split for evaluation"


def test_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = _source(tmp_path / "rows.jsonl", _rows(5, 0))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"messages": _rows(1, 9)[0]}) + "\n")
    with pytest.raises(RecipeError) as caught:
        _prepare(tmp_path / "d", source)
    assert "changed while its rows were read" in caught.value.problems[0].message
