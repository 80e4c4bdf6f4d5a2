"""``fsdpq bench data`` prepares rows that the tokenizer has words for, and counts them."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer import save_tokenizer

from fsdpq.errors import UsageError
from fsdpq.run_files.benchmarks import BenchJob
from fsdpq.worker.bench import data
from fsdpq.worker.bench.children import Work


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory as `fetch_tokenizer` finds one."""
    directory = save_tokenizer(tmp_path / "tokenizer")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def run_here(
    work: Work, _directory: Path, *, on_poll: Callable[[Sequence[int]], None]
) -> list[Any]:
    on_poll([os.getpid()])
    arguments = json.loads(json.dumps(work.arguments, default=str))
    return [pkgutil.resolve_name(work.function)(**arguments)]


def test_both_kinds_are_prepared_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "run_children", run_here)
    monkeypatch.setitem(data.WAYS, data.THEIRS, data.WAYS[data.OURS])
    settings = {"rows": 60, "repeats": 2, "kinds": "alpaca chat"}
    job = BenchJob("cpu", True, 1, tmp_path / "made up", settings, str(tokenizer))
    result = data.measure_data(job, lambda _text: None)
    rows = {(row["rows"], row["contender"]): row for row in result.tables[0].rows}
    assert len(rows) == 4
    for row in rows.values():
        assert row["rows_per_s"].count == 2
        assert row["peak_mb"] > 20
        assert row["tokens"] == pytest.approx(row["filled"] * row["sequences"] * data.SEQ_LEN)
    assert rows["60 chat", "fsdpq"]["tokens"] > rows["60 alpaca", "fsdpq"]["tokens"] > 60 * 50
    names = [ratio.name for ratio in result.ratios]
    assert names == [f"{what} of {kind}, of TRL" for kind in ("alpaca", "chat")
                     for what in ("rows/s", "peak")]  # fmt: skip
    lines = (tmp_path / "made up/chat/rows.jsonl").read_text().splitlines()
    drawn = [json.loads(line)["messages"] for line in lines]
    assert {len(messages) for messages in drawn} == {2, 4, 6, 8, 10}
    words = " ".join(messages[0]["content"].strip(".") for messages in drawn).lower().split()
    assert "capital" in words, "words of the vocabulary"


def test_an_unknown_kind_is_the_users_mistake(tmp_path: Path) -> None:
    job = BenchJob("cpu", False, 1, tmp_path, {"kinds": "poems", "rows": 1, "repeats": 1})
    with pytest.raises(UsageError, match=r"data\.kinds=poems"):
        data.measure_data(job, lambda _text: None)
