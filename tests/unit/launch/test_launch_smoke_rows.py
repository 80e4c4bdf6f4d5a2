"""Rows of a smoke run: every source of the recipe has made-up ones of its format."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpq.launch.inputs.smoke_rows import make_smoke_rows
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.read import read_rows


def test_every_source_has_rows_of_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path))
    parts = [
        {"path": "a.jsonl", "format": "alpaca", "columns": {"output": "reply"}, "weight": 2.0},
        {"dataset": "org/chats", "format": "auto", "weight": 1.0},
        {"path": ("b.jsonl", "c.jsonl"), "format": "input_output", "weight": 1.0},
    ]
    options = DataOptions.model_validate(
        {"mixture": tuple(parts), "eval": {"path": "e.txt", "format": "text"}}
    )
    told: list[str] = []
    sources = make_smoke_rows(options, base_dir=tmp_path, report=told.append)
    assert [source.format for source in sources.train] == ["alpaca", "messages", "input_output"]
    assert [source.weight for source in sources.train] == [2.0, 1.0, 1.0]
    assert sources.eval is not None
    every = (*sources.train, sources.eval)
    assert [source.key for source in every] == [
        "data.mixture.0", "data.mixture.1", "data.mixture.2", "data.eval",
    ]  # fmt: skip
    for source in every:
        assert sum(1 for _ in read_rows(source)) == source.num_rows
    said = [line for line in told if line.startswith("smoke:")]
    assert said[1] == "smoke: made-up rows of `messages` stand in for org/chats"
    assert said[2] == "smoke: made-up rows stand in for b.jsonl, c.jsonl"


def test_made_up_rows_need_none() -> None:
    [source] = make_smoke_rows(DataOptions(format="dummy"), base_dir=Path(), report=print).train
    assert (source.format, source.files) == ("dummy", ())
