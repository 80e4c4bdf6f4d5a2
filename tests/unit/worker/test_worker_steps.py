"""How many steps a run has, what a stream says of its rows, and evaluation in parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import random_rows, tiny_recipe
from support.tokenizer import build_tokenizer

from fsdpq.data.dealing.loader import EpochOrder
from fsdpq.errors import RecipeError
from fsdpq.rows.source import DataSources, RowSource, SourceFile
from fsdpq.worker.steps import count_rows, count_steps, iterate_held_out, open_loader
from fsdpq.worker.stream import open_stream, report_stream

CPU = torch.device("cpu")


class Events:
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    @property
    def notices(self) -> list[str]:
        return [row["message"] for row in self.rows if row["event"] == "notice"]


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [
        ({"epochs": 1.0}, 10, 3),
        ({"epochs": 2.0}, 20, 5),
        ({"epochs": 0.5}, 5, 2),
        ({"epochs": 0.01}, 1, 1),
        ({"epochs": None}, 10, 3),
        ({"steps": 7, "epochs": None}, None, 7),
    ],
)
def test_epochs_are_counted_in_rows(training: dict[str, Any], rows: int | None, steps: int) -> None:
    known = {"steps": None, "global_batch_size": 4}
    recipe = tiny_recipe(training=known | training)
    assert count_rows(recipe, 10) == rows
    assert count_steps(recipe, 10) == steps


def test_a_run_of_one_epoch_ends_with_its_rows() -> None:
    recipe = tiny_recipe(training={"steps": None, "epochs": 1.0, "global_batch_size": 4})
    rows = random_rows(10)
    order = EpochOrder(rows, seed=1, digest="", shuffle=True)
    with open_loader(recipe, order, len(rows), CPU) as loader:
        sizes = [sum(len(m.input_ids) for m in step.micro_batches) for step in loader]
    assert sizes == [4, 4, 2]


def test_held_out_rows_come_once_shortest_first() -> None:
    rows = random_rows(7)
    steps = list(iterate_held_out(rows, micro_batch_size=2))
    widths = [step.micro_batches[0].input_ids.shape[1] for step in steps]
    assert len(steps) == 4
    assert widths == sorted(widths)
    assert sum(step.num_tokens for step in steps) == sum(len(row) for row in rows)
    assert sum(step.num_trained for step in steps) == sum(row.num_trained for row in rows)


def _source(path: Path, rows: Sequence[Mapping[str, Any]]) -> RowSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = SourceFile(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return RowSource(path.name, (file,), "prompt_completion", len(rows))


SHORT = {"prompt": "one ", "completion": "two"}
LONG = {"prompt": "one ", "completion": "two " * 60}
UNTRAINED = {"prompt": "one " * 60, "completion": "two"}


def _recipe(**data: Any) -> Any:
    known = {"path": "rows.jsonl", "format": "prompt_completion", "seq_len": 32}
    return tiny_recipe(data=known | {"streaming": True} | data)


def test_a_stream_says_what_became_of_its_rows(tmp_path: Path) -> None:
    train = _source(tmp_path / "rows.jsonl", [SHORT, LONG, UNTRAINED, SHORT, SHORT])
    own_eval = _source(tmp_path / "eval.jsonl", [SHORT, LONG])
    recipe, events = _recipe(packing="best_fit"), Events()
    stream, held_out = open_stream(
        recipe, DataSources((train,), own_eval), build_tokenizer(), events
    )
    assert len(held_out) == 2
    assert events.notices == ["1 rows for evaluation are longer than 32 tokens: cut"]
    loader = open_loader(recipe, stream, stream.rows_per_epoch, CPU)
    with loader:
        next(loader)
    window = next(row for row in events.rows if row["event"] == "stream")
    counts = {key: window[key] for key in ("rows", "cut", "too_long", "untrained", "documents")}
    assert counts == {"rows": 5, "cut": 2, "too_long": 0, "untrained": 1, "documents": 4}
    assert window["fill"] == window["tokens"] / (32 * window["sequences"])
    events.rows.clear()
    stream.counts.rows = 10
    report_stream(stream, recipe.data, events)
    assert events.notices[0] == (
        f"{stream.counts.cut} rows of 10 that were streamed are longer than 32 tokens: cut"
    )
    assert events.notices[-1].startswith(f"packed {stream.counts.documents} streamed rows into ")


def test_an_evaluation_source_without_loss_is_an_error(tmp_path: Path) -> None:
    train = _source(tmp_path / "rows.jsonl", [SHORT])
    own_eval = _source(tmp_path / "eval.jsonl", [UNTRAINED])
    with pytest.raises(RecipeError) as caught:
        open_stream(_recipe(), DataSources((train,), own_eval), build_tokenizer(), Events())
    assert caught.value.problems[0].key == "data.eval"
