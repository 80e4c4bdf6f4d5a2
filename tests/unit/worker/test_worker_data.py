"""What the worker says about the rows that were cut, left out or packed."""

from __future__ import annotations

from fsdpq.rows.report import DataReport, SourceCounts
from fsdpq.worker.setup import list_notices


def test_what_was_done_to_rows_is_said() -> None:
    counts = SourceCounts("rows.jsonl", num_rows=20, num_cut=2, num_untrained=5, num_bad=1)
    assert list_notices(DataReport(64, (counts,))) == [
        "2 rows are longer than 64 tokens: cut",
        "5 rows have no token that carries loss: left out",
        "1 rows are bad: left out",
    ]
    dropped = DataReport(64, (SourceCounts("rows.jsonl", num_too_long=4),))
    assert list_notices(dropped) == ["4 rows are longer than 64 tokens: left out"]
    assert list_notices(DataReport(64, (SourceCounts("rows.jsonl", num_rows=9),))) == []


def test_rows_of_several_sources_are_told_apart() -> None:
    report = DataReport(
        64,
        (SourceCounts("a.jsonl", num_cut=1), SourceCounts("b.jsonl")),
        eval=SourceCounts("c.jsonl", num_untrained=3),
        num_train_rows=30,
        num_sequences=7,
        fill=0.9765,
    )
    assert list_notices(report) == [
        "1 rows of a.jsonl are longer than 64 tokens: cut",
        "3 rows of c.jsonl have no token that carries loss: left out",
        "packed 30 training rows into 7 sequences of 64 tokens, 97.7% filled",
    ]
