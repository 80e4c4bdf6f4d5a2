"""Streams: every row once an epoch, the same on any number of ranks, resumable, bounded."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer import build_tokenizer

from fsdpq.data.dealing import stream as stream_module
from fsdpq.data.dealing.interleave import RowMixture
from fsdpq.data.dealing.loader import Deal, DealtRow, Loader
from fsdpq.data.dealing.order import Position
from fsdpq.data.dealing.stream import RowStream, WindowReport
from fsdpq.data.preparing.row_chunks import ChunkTokenizer
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.errors import CheckpointError, RecipeError, TrainingError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.read import read_rows
from fsdpq.rows.source import RowSource, SourceFile

SEED = 5
START = Position()


@cache
def _tokenizer() -> Any:
    return build_tokenizer()


def _content(number: int) -> dict[str, str]:
    return {"prompt": f"row {number}: ", "completion": "one two three " * (1 + number % 7)}


def _write(path: Path, rows: Sequence[Mapping[str, Any]], **changes: Any) -> RowSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = SourceFile(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return RowSource(path.name, (file,), "prompt_completion", len(rows), **changes)


def _source(path: Path, numbers: range, **changes: Any) -> RowSource:
    return _write(path, [_content(number) for number in numbers], **changes)


def _options(window: int = 10, **changes: Any) -> DataOptions:
    known: dict[str, Any] = {"format": "prompt_completion", "seq_len": 64, "streaming": True}
    options = DataOptions.model_validate({"path": "rows.jsonl"} | known | changes)
    return options.model_copy(update={"stream_window": window})


def _stream(
    *sources: RowSource, options: DataOptions, seed: int = SEED, **others: Any
) -> RowStream:
    return RowStream(sources, options, _tokenizer(), seed=seed, **others)


def _documents(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Returns the tokens of every document, packed or not."""
    found: list[tuple[int, ...]] = []
    for row in rows:
        start = 0
        for length in row.document_lengths or (len(row),):
            found.append(tuple(row.input_ids[start : start + length].tolist()))
            start += length
    return found


def _tokenized(source: RowSource, options: DataOptions) -> list[tuple[int, ...]]:
    """Returns the tokens of every row of a source, in order."""
    template = stream_module.choose_template(_tokenizer(), None)
    tokenizer = RowTokenizer(_tokenizer(), options, source.format, template=template)
    rows = tokenizer.tokenize([row.content for row in read_rows(source)])
    return _documents([row for row in rows if isinstance(row, Row)])


def _deal(stream: RowStream, count: int, start: Position = START) -> list[DealtRow]:
    dealt = stream.deal(start)
    found = list(islice(dealt, count))
    dealt.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _epoch(stream: RowStream, epoch: int = 1) -> list[Row]:
    """Returns the rows of one epoch in their order."""
    rows: list[Row] = []
    for dealt in stream.deal(Position(epoch)):
        rows.append(dealt.read())
        if dealt.after.epoch != epoch:
            break
    return rows


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("num_rows", [3, 20, 37])
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
    tmp_path: Path, packing: str, num_rows: int
) -> None:
    options = _options(packing=packing)
    source = _source(tmp_path / "rows.jsonl", range(num_rows))
    stream = _stream(source, options=options)
    first, second = _documents(_epoch(stream)), _documents(_epoch(stream, 2))
    expected = _tokenized(source, options)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second or num_rows == 3
    for start in range(0, num_rows, 10):  # rows stay in their window
        window = slice(start, start + 10)
        assert sorted(first[window]) == sorted(expected[window])


def test_the_order_is_that_of_the_files_without_shuffling(tmp_path: Path) -> None:
    options = _options(shuffle=False)
    source = _source(tmp_path / "rows.jsonl", range(25))
    assert _documents(_epoch(_stream(source, options=options))) == _tokenized(source, options)


def test_the_order_does_not_depend_on_how_rows_are_grouped_for_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [_source(tmp_path / f"{n}.jsonl", range(n, n + 20)) for n in (0, 100)]
    options = _options(window=15)
    orders = []
    for chunk_rows in (4, 500):
        monkeypatch.setattr(stream_module, "CHUNK_ROWS", chunk_rows)
        orders.append(_documents(_epoch(_stream(*sources, options=options))))
    assert orders[0] == orders[1]


def _steps(stream: RowStream, deal: Deal, state: Any = None) -> tuple[list[list[Any]], list[Any]]:
    """Returns the rows of each step on one rank, and the loader's state after each."""
    rows, states = list[list[Any]](), list[Any]()
    with Loader(stream, deal) as loader:
        if state is not None:
            loader.load_state_dict(state)
        for step in loader:
            states.append(json.loads(json.dumps(loader.state_dict())))
            rows.append(
                [
                    line[kept].tolist()
                    for m in step.micro_batches
                    for line, kept in zip(m.input_ids, m.is_token, strict=True)
                    if kept.any()
                ]
            )
    return rows, states


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_stream_goes_on_anywhere_with_any_number_of_ranks(tmp_path: Path, packing: str) -> None:
    options = _options(packing=packing, seq_len=40)
    sources = [
        _source(tmp_path / "a.jsonl", range(23), weight=2.0),
        _source(tmp_path / "b.jsonl", range(100, 130), weight=1.0),
    ]
    total = 60
    whole, states = _steps(_stream(*sources, options=options), Deal(4, 4, 0, 1, total))
    assert len(whole) == 15
    assert states[-1]["position"]["epoch"] > 1
    for done in (1, 3, 8, 14):
        rest = [
            _steps(_stream(*sources, options=options), Deal(4, 1, rank, 3, total), states[done - 1])
            for rank in range(3)
        ]
        joined = [sorted(sum(parts, [])) for parts in zip(*(rows for rows, _ in rest), strict=True)]  # noqa: RUF017
        assert joined == [sorted(step) for step in whole[done:]]
        assert all(last == states[done:] for _, last in rest)


def test_earlier_windows_are_not_tokenized_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "rows.jsonl", range(50))
    options = _options(shuffle=False)
    seen: list[str] = []
    call = ChunkTokenizer.__call__

    def watch(self: ChunkTokenizer, chunk: Any) -> Any:
        seen.extend(row["prompt"] for row in chunk[1])
        return call(self, chunk)

    monkeypatch.setattr(ChunkTokenizer, "__call__", watch)
    _deal(_stream(source, options=options), 3, Position(2, 3, 4))
    assert seen[:10] == [f"row {number}: " for number in range(30, 40)]


def _shares(parts: Sequence[RowSource], count: int, stopping: Any) -> list[int]:
    mixture = RowMixture(parts, stopping=stopping, on_bad_row="error")
    return [mixed.part for mixed in islice(mixture.read(epoch=1, skip=0), count)]


def test_weights_hold_all_along_and_every_row_is_used_in_time(tmp_path: Path) -> None:
    parts = [
        _source(tmp_path / "a.jsonl", range(30), weight=3.0),
        _source(tmp_path / "b.jsonl", range(40), weight=1.0),
    ]
    mixture = RowMixture(parts, stopping="first_exhausted", on_bad_row="error")
    assert mixture.rows_per_epoch == 40
    rows = list(islice(mixture.read(epoch=1, skip=0), 160))
    for end in range(1, 161):
        assert abs(sum(row.part == 0 for row in rows[:end]) - 0.75 * end) <= 1
    used = Counter((row.part, row.row.number) for row in rows)
    assert set(used.values()) == {1, 4}  # 120 of 30 rows, 40 of 40
    for skip in (0, 17, 39):
        later = list(islice(mixture.read(epoch=3, skip=skip), 160 - 80 - skip))
        assert later == rows[80 + skip :]


def test_all_exhausted_repeats_the_smaller_part(tmp_path: Path) -> None:
    parts = [
        _source(tmp_path / "a.jsonl", range(4), weight=1.0),
        _source(tmp_path / "b.jsonl", range(20), weight=2.0),
    ]
    assert Counter(_shares(parts, 30, "all_exhausted")) == {0: 10, 1: 20}


def test_without_weights_all_rows_come_once_spread_evenly(tmp_path: Path) -> None:
    parts = [_source(tmp_path / f"{n}.jsonl", range(n)) for n in (6, 3, 1)]
    assert _shares(parts, 10, "first_exhausted") == [0, 1, 0, 0, 1, 2, 0, 0, 1, 0]


def test_a_stream_shorter_than_a_batch_fills_it_with_the_next_epochs(tmp_path: Path) -> None:
    stream = _stream(_source(tmp_path / "rows.jsonl", range(3)), options=_options())
    rows, states = _steps(stream, Deal(8, 8, 0, 1, 24))
    assert [len(step) for step in rows] == [8, 8, 8]
    assert [state["position"]["epoch"] for state in states] == [3, 6, 9]


def test_rows_without_loss_are_an_error_not_a_loop_without_end(tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 40, "completion": "never reached"}] * 25
    source = _write(tmp_path / "rows.jsonl", rows)
    loader = Loader(_stream(source, options=_options(seq_len=8)), Deal(4, 4, 0, 1))
    with loader, pytest.raises(RecipeError) as caught:
        loader.start()
    message = caught.value.problems[0].message
    assert message == "none of the 25 rows has a token that carries loss"


def test_a_row_that_cannot_be_used_is_named_before_training(tmp_path: Path) -> None:
    rows = [_content(0), _content(1), {"prompt": "a", "completion": "word " * 60}]
    source = _write(tmp_path / "rows.jsonl", rows)
    options = _options(truncation="error")
    loader = Loader(_stream(source, options=options), Deal(2, 2, 0, 1))
    with loader, pytest.raises(RecipeError) as caught:
        loader.start()
    problem = caught.value.problems[0]
    assert problem.location is not None
    assert (problem.location.source, problem.location.line) == (str(tmp_path / "rows.jsonl"), 3)
    assert "`data.seq_len` is 64" in problem.message


def test_every_window_is_reported(tmp_path: Path) -> None:
    rows = [_content(number) for number in range(25)]
    rows[3] = {"prompt": "word " * 80, "completion": "cut off"}
    rows[14] = {"prompt": "a", "completion": "word " * 80}
    reports: list[WindowReport] = []
    source = _write(tmp_path / "rows.jsonl", rows)
    stream = _stream(source, options=_options(packing="best_fit"), on_window=reports.append)
    dealt = _epoch(stream)
    assert [(r.epoch, r.window, r.counts.rows) for r in reports[:3]] == [
        (1, 0, 10), (1, 1, 10), (1, 2, 5),
    ]  # fmt: skip
    assert [r.counts.untrained for r in reports[:3]] == [1, 0, 0]
    assert [r.counts.cut for r in reports[:3]] == [1, 1, 0]
    assert sum(r.counts.documents for r in reports[:3]) == 24
    assert sum(r.counts.sequences for r in reports[:3]) == len(dealt)
    assert sum(r.counts.tokens for r in reports[:3]) == sum(map(len, dealt))
    assert sum(r.counts.trained_tokens for r in reports[:3]) == sum(r.num_trained for r in dealt)


def test_bad_rows_are_skipped_and_slices_kept_epoch_after_epoch(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [_content(number) for number in range(30)]
    source = _write(path, [*rows[:12], {"prompt": 3}, *rows[12:]])
    part = replace(source, split="train[10:26]", num_rows=15, num_bad_rows=1)
    options = _options(on_bad_row="skip", shuffle=False)
    stream = _stream(part, options=options)
    wanted = _tokenized(_source(tmp_path / "good.jsonl", range(10, 25)), options)
    assert _documents(_epoch(stream)) == _documents(_epoch(stream, 2)) == wanted


@pytest.mark.parametrize("numbers", [range(26), range(100, 125)])
def test_files_that_change_end_the_run(tmp_path: Path, numbers: range) -> None:
    path = tmp_path / "rows.jsonl"
    stream = _stream(_source(path, range(25)), options=_options())
    _source(path, numbers)
    with pytest.raises(TrainingError, match="changed while it was streamed"):
        _deal(stream, 40)


def test_a_state_of_other_rows_or_options_is_refused(tmp_path: Path) -> None:
    options, deal = _options(), Deal(2, 2, 0, 1)
    source = _source(tmp_path / "rows.jsonl", range(25))
    state = Loader(_stream(source, options=options), deal).state_dict()
    moved = _source(tmp_path / "moved.jsonl", range(25))
    Loader(_stream(moved, options=options), deal).load_state_dict(state)
    others = [
        (_source(tmp_path / "other.jsonl", range(1, 26)), options),
        (source, _options(window=11)),
        (source, _options(seq_len=32)),
        (source, _options(packing="best_fit")),
        (source, _options(train_on_prompt=True)),
    ]
    for other, changed in others:
        with pytest.raises(CheckpointError, match="other training rows"):
            Loader(_stream(other, options=changed), deal).load_state_dict(state)


def test_no_thread_stays_behind(tmp_path: Path) -> None:
    source = _source(tmp_path / "rows.jsonl", range(300))
    with Loader(_stream(source, options=_options()), Deal(4, 4, 0, 1)) as loader:
        next(loader)
    assert not [thread for thread in threading.enumerate() if "fsdpq" in thread.name]


def _peak_bytes(path: Path, num_rows: int) -> int:
    """Returns the most memory that numpy and Python hold while all rows are streamed."""
    source = _source(path, range(num_rows))
    stream = _stream(source, options=_options(window=100, packing="best_fit"))
    gc.collect()
    tracemalloc.start()
    try:
        with Loader(stream, Deal(16, 16, 0, 1)) as loader:
            while loader.state_dict()["position"]["epoch"] == 1:
                next(loader)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    small, large = (_peak_bytes(tmp_path / f"{n}.jsonl", n) for n in (400, 4_000))
    # How far the threads are ahead at the moment of the peak differs from run to run.
    assert large < 1.25 * small
