"""A run directory may hold anything: damaged, of another version, a stranger's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.run_dirs import HOSTILE, Tags, write_full_run

from fsdpq.reports.comparison import ComparedRun, comparison_content
from fsdpq.reports.comparison_page import render_comparison
from fsdpq.reports.report import render_html, report_content
from fsdpq.reports.run_record import read_record
from fsdpq.reports.run_shapes import NUMBER, TEXT, fit
from fsdpq.run_files.paths import RunFiles

ODD: tuple[Any, ...] = (HOSTILE, "", [], {}, None, True, -1, 10**400, 1.5, [1, "a"], {"a": 1}, [[]])


def replace_one(value: Any, chance: random.Random) -> Any:
    """Returns JSON data with one value in it, chosen by chance, replaced by an odd one."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        value[key] = replace_one(value[key], chance)
        return value
    return chance.choice(ODD)


def damage(files: RunFiles, chance: random.Random) -> None:
    """Replaces a value in every file, and in every third row of the rows."""
    for path in (files.resolved, files.lock, files.plan, files.evals / "one.json"):
        path.write_text(json.dumps(replace_one(json.loads(path.read_text()), chance)))
    for path in (files.metrics, files.events):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [replace_one(row, chance) if chance.random() < 0.33 else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("seed", range(16))
def test_whatever_a_run_holds_there_is_a_page_of_it(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    files = write_full_run(tmp_path / "run")
    damage(files, chance)
    whole = read_record(write_full_run(tmp_path / "whole"))
    record = read_record(files)
    content = report_content(record, name="run")
    runs = [ComparedRun("run", "run", record), ComparedRun("whole", "whole", whole)]
    compared = comparison_content(runs, [])
    json.dumps([content, compared], allow_nan=False)
    for page in (render_html(content), render_comparison(compared, runs, links=["", ""])):
        assert not {tag for tag, _ in Tags(page).found} & {"script", "img"}


def test_numbers_that_are_none_count_as_missing_and_other_keys_stay() -> None:
    shape = {"loss": NUMBER, "name": TEXT, "ranks": [NUMBER], "more": {"*": NUMBER}}
    row = {"loss": "2.5", "name": 3, "ranks": [1, None], "more": {"a": True, "b": 2}, "x": [1]}
    expected = {"loss": None, "name": None, "ranks": [], "more": {"a": None, "b": 2}, "x": [1]}
    assert fit(row, shape) == expected
    assert fit({"loss": 2.5}, shape) == {"loss": 2.5}
    assert fit([], shape, complete=True) == {"loss": None, "name": None, "ranks": [], "more": {}}
    assert fit(1e31, NUMBER) is None


def test_rows_without_a_step_are_counted_and_left_out(tmp_path: Path) -> None:
    files = write_full_run(tmp_path)
    with files.metrics.open("a") as file:
        file.write('{"event": "step", "step": "x", "loss": 1}\n{"no": "event"}\n')
    content = report_content(read_record(files), name="run")
    assert content["missing"] == ["metrics.jsonl has 2 rows of nothing that is known"]
    assert [row["step"] for row in content["steps"]] == [1, 2, 3, 4]
