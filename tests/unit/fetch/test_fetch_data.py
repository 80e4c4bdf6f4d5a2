"""Data becomes a file with good rows: local files, packages, the hub (a stand-in server)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_files import COMMIT, HubFiles, hub_of
from support.imports import imported_by

from fsdpq.errors import FetchError, RecipeError
from fsdpq.fetch import data as data_module
from fsdpq.fetch.data import fetch_data
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.source import DataSources, RowSource

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))


def fetch(base_dir: Path, **options: Any) -> RowSource:
    sources = fetch_data(DataOptions(**options), base_dir=base_dir, report=[].append)
    assert DataSources.from_json(json.loads(json.dumps(sources.as_json()))) == sources
    (source,) = sources.train
    return source


def test_json_lines_are_counted_and_hashed(tmp_path):
    content = b'{"text": "a"}\n\n{"text": "b"}'
    (tmp_path / "rows.jsonl").write_bytes(content)
    fetched = fetch(tmp_path, path="rows.jsonl", format="text")
    assert fetched.files[0].path == tmp_path / "rows.jsonl"
    assert fetched.num_rows == 2
    assert fetched.files[0].sha256 == hashlib.sha256(content).hexdigest()
    assert fetch(tmp_path, path="rows.jsonl", format="text", max_rows=1).num_rows == 1


def test_bad_rows_are_a_mistake_in_the_recipe_not_of_the_machine(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text":\n[1]\n')
    with pytest.raises(RecipeError) as caught:
        fetch(tmp_path, path="rows.jsonl", format="text")
    assert [problem.location.line for problem in caught.value.problems] == [2, 3]


def test_dummy_rows_need_no_source(tmp_path):
    assert fetch(tmp_path, format="dummy").num_rows == 512
    assert fetch(tmp_path, format="dummy", max_rows=3) == RowSource("made up", (), "dummy", 3)


def test_unknown_package_lists_what_there_is(tmp_path):
    with pytest.raises(FetchError) as caught:
        fetch(tmp_path, dataset="pypi:requests")
    assert caught.value.hint == "there is `pypi:chatterbot-english`"


def test_fetching_data_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "pyarrow", "numpy", "huggingface_hub")
    assert imported_by(f"import {data_module.__name__}", heavy) == []


FETCH = """
import json, sys
from pathlib import Path
from fsdpq.errors import FsdpqError
from fsdpq.fetch.data import fetch_data
from fsdpq.recipe.sections.data import DataOptions
lines = []
options = DataOptions(**json.loads(sys.argv[1]))
try:
    (fetched,) = fetch_data(options, base_dir=Path.cwd(), report=lines.append).as_json()["train"]
    fetched |= fetched["files"][0]
except FsdpqError as error:
    fetched = {"error": error.message, "hint": error.hint}
print(json.dumps(fetched | {"lines": lines, "torch": "torch" in sys.modules}, default=str))
"""


@pytest.fixture
def hub() -> Iterator[HubFiles]:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    files = {"train.jsonl": lines.encode(), "README.md": b"rows", "rows.py": b"raise"}
    with hub_of("datasets/org/rows", files) as server:
        yield server


def fetch_apart(hub: HubFiles, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Fetches in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps({"dataset": "org/rows"} | options)],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_dataset_of_the_hub_is_pinned_read_and_cached(hub, tmp_path):
    first = fetch_apart(hub, tmp_path, format="qna_no_ctx", split="train[:30%]", revision="main")
    rows = [json.loads(line) for line in Path(first["path"]).read_text().splitlines()]
    assert rows == ROWS[:3]
    assert first["num_rows"] == 3
    assert first["revision"] == COMMIT
    assert first["sha256"] == hashlib.sha256(Path(first["path"]).read_bytes()).hexdigest()
    assert first["torch"] is False
    assert not any("rows.py" in path for path in hub.requests), "scripts are never asked for"
    hub.shutdown()
    hub.server_close()
    again = fetch_apart(hub, tmp_path, format="qna_no_ctx", split="train[:30%]", revision="main")
    assert (again["path"], again["sha256"]) == (first["path"], first["sha256"])
    assert not any("reading split" in line for line in again["lines"])


def test_a_split_that_is_not_there_is_said_with_those_that_are(hub, tmp_path):
    answer = fetch_apart(hub, tmp_path, format="qna_no_ctx", split="validation")
    assert answer["error"].endswith("it has no split `validation`, only `train`")


def test_a_configuration_is_chosen_or_named(hub, tmp_path):
    readme = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n"
    readme += "- config_name: de\n  data_files: de.jsonl\n---\n"
    hub.files.clear()
    hub.files |= {"README.md": readme.encode()}
    hub.files |= {f"{name}.jsonl": b'{"text": "%s"}' % name.encode() for name in ("en", "de")}
    answer = fetch_apart(hub, tmp_path, format="text")
    assert "it has several configurations: `en`, `de`" in answer["error"]
    assert answer["hint"] == "write `config: en`"
    answer = fetch_apart(hub, tmp_path, format="text", config="eng")
    assert "it has no `eng`: `en`, `de`" in answer["error"]
    assert answer["hint"] == "did you mean `config: en`?"
    answer = fetch_apart(hub, tmp_path, format="text", config="de")
    assert Path(answer["path"]).read_text() == '{"text": "de"}\n'
    assert "(configuration de, split train)" in answer["name"]


def test_a_repository_of_scripts_is_refused_before_the_download(hub, tmp_path):
    del hub.files["train.jsonl"]
    answer = fetch_apart(hub, tmp_path, format="qna_no_ctx")
    assert "dataset scripts are not run" in answer["error"]
    assert "refs/convert/parquet" in answer["hint"]
