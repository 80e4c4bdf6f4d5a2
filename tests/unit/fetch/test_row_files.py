"""Which files a path means, and how rows of them are read and checked before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fsdpq.errors import FetchError, Location, Problem, RecipeError
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.row_files import find_row_files, split_of
from fsdpq.recipe.marks import Marks
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.read import check_source, read_rows
from fsdpq.rows.source import DataSources


def _write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _fetch(base_dir: Path, **options: Any) -> tuple[DataSources, list[str]]:
    notes: list[str] = []
    given: dict[str, Any] = {"format": "text", **options}
    return fetch_data(DataOptions(**given), base_dir=base_dir, report=notes.append), notes


def _texts(base_dir: Path, **options: Any) -> list[str]:
    (source,) = _fetch(base_dir, **options)[0].train
    found = [row.content["text"] for row in read_rows(source)]
    assert source.num_rows == len(found)
    return found


def _refused(base_dir: Path, **options: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        _fetch(base_dir, **options)
    return caught.value.problems


def test_a_pattern_a_list_and_a_directory_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        _write(tmp_path / f"rows/{name}.jsonl", name)
    _write(tmp_path / "rows/more/d.jsonl", "d")
    assert _texts(tmp_path, path="rows/*.jsonl") == ["a", "b", "c"]
    assert _texts(tmp_path, path=str(tmp_path / "rows/[bc].jsonl")) == ["b", "c"]
    assert _texts(tmp_path, path=["rows/c.jsonl", "rows/a.jsonl"]) == ["c", "a"]
    assert _texts(tmp_path, path="rows") == ["a", "b", "c", "d"]
    assert _texts(tmp_path, path="rows/**/*.jsonl") == ["a", "b", "c", "d"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    _write(tmp_path / "rows[1].jsonl", "x")
    _write(tmp_path / "rows1.jsonl", "y")
    assert _texts(tmp_path, path="rows[1].jsonl") == ["x"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("rows.jsonl", "train"),
        ("train.csv", "train"),
        ("my-dev-set.jsonl.gz", "validation"),
        ("test/rows.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("latest.jsonl", "train"),
        ("contest_1.jsonl", "train"),
    ],
)
def test_names_tell_the_split(name: str, split: str) -> None:
    assert split_of(Path(name)) == split


def test_splits_of_a_directory_are_kept_apart(tmp_path: Path) -> None:
    _write(tmp_path / "rows/train-00000-of-00001.jsonl", "a")
    _write(tmp_path / "rows/validation.jsonl", "b")
    _write(tmp_path / "rows/.hidden.jsonl", "c")
    (tmp_path / "rows/README.md").write_text("about")
    sources, notes = _fetch(tmp_path, path="rows")
    assert [file.path.name for file in sources.train[0].files] == ["train-00000-of-00001.jsonl"]
    assert notes == [
        f"note: {tmp_path}/rows: `validation.jsonl` not read: other splits than `train`",
        f"note: {tmp_path}/rows: `.hidden.jsonl`, `README.md` not read",
    ]
    assert _texts(tmp_path, path="rows", split="validation") == ["b"]
    [problem] = _refused(tmp_path, path="rows", split="valid")
    assert problem.message.endswith("has no split `valid`, only `train` and `validation`")
    assert (problem.key, problem.hint) == ("data.split", "did you mean `validation`?")


def test_what_datasets_saved_is_read_by_its_own_list(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(10)]})
    rows = rows.shuffle(seed=0)
    both = datasets.DatasetDict({"train": rows, "test": rows.select([3])})
    both.save_to_disk(str(tmp_path / "both"), num_shards={"train": 3, "test": 1})
    rows.save_to_disk(str(tmp_path / "one"))
    assert _texts(tmp_path, path="one") == rows["text"][:]
    assert _texts(tmp_path, path="both") == rows["text"][:]
    assert _texts(tmp_path, path="both", split="test") == [rows[3]["text"]]
    (tmp_path / "both/train/data-00001-of-00003.arrow").unlink()
    assert "lacks files" in _refused(tmp_path, path="both")[0].message


@pytest.mark.parametrize("part", ["[:3]", "[3:]", "[2:5]", "[-4:]", "[:-2]", "[10%:55%]", "[90:]",
                                  "[-50:2]", "[:1%]", "[33%:66%]", "[-15%:]"])  # fmt: skip
@pytest.mark.parametrize("count", [1, 7, 50])
def test_slices_are_those_of_datasets(tmp_path: Path, part: str, count: int) -> None:
    texts = [str(i) for i in range(count)]
    _write(tmp_path / "a.jsonl", *texts[: count // 2 + 1])
    _write(tmp_path / "b.jsonl", *texts[count // 2 + 1 :])
    paths = ["a.jsonl", "b.jsonl"] if count > 1 else ["a.jsonl"]
    instruction = datasets.ReadInstruction.from_spec(f"train{part}")
    [absolute] = instruction.to_absolute({"train": count})
    expected = texts[absolute.from_ : absolute.to]
    if expected:
        assert _texts(tmp_path, path=paths, split=f"train{part}") == expected
    else:
        [problem] = _refused(tmp_path, path=paths, split=f"train{part}")
        assert "is empty" in problem.message
        assert problem.key == "data.split"


def test_every_part_of_a_mixture_is_fetched_and_its_mistakes_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", "a", "b")
    (tmp_path / "b.jsonl").write_text('{"q": "x", "answer": "y"}\n')
    question: dict[str, Any] = {
        "path": "b.jsonl",
        "format": "qna_no_ctx",
        "columns": {"question": "q"},
    }
    mixture: list[dict[str, Any]] = [
        {"path": "a.jsonl", "format": "text", "weight": 3},
        question | {"weight": 1},
    ]
    held_out = {"path": "a.jsonl", "format": "text", "split": "train[1:]"}
    sources, _ = _fetch(tmp_path, mixture=mixture, eval=held_out)
    assert [(part.num_rows, part.weight, part.key) for part in sources.train] == [
        (2, 3.0, "data.mixture.0"),
        (1, 1.0, "data.mixture.1"),
    ]
    [row] = read_rows(sources.train[1])
    assert row.content == {"question": "x", "answer": "y"}
    assert sources.eval is not None
    assert [row.content["text"] for row in read_rows(sources.eval)] == ["b"]
    assert DataSources.from_json(json.loads(json.dumps(sources.as_json()))) == sources
    _write(tmp_path / "c.jsonl", "c")
    mixture[1] |= {"path": "no.jsonl"}
    held_out |= {"path": "c.jsonl"}
    problems = _refused(tmp_path, mixture=mixture, eval=held_out)
    assert {problem.key for problem in problems} == {"data.mixture.1.path", "data.eval.split"}


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("no.jsonl", "data.path", "is not there"),
        ("no*.jsonl", "data.path", "matches no file"),
        ("empty", "data.path", "has no file of rows, only `notes.md`"),
        ("dangling.jsonl", "data.path", "is a link to nothing"),
        ("links", "data.path", "dangling.jsonl` is a link to nothing"),
        (["a.jsonl", "*.jsonl"], "data.path", "means"),
        (["a.jsonl", "no.jsonl"], "data.path.1", "is not there"),
        ("void.jsonl", "data", "has no rows"),
        (["a.jsonl", "void.jsonl"], "data", "has no rows, and other files have"),
        ("rows.xlsx", "data", "ends in none of"),
        ("fifo.jsonl", "data.path", "is no file"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(
    tmp_path: Path, path: Any, key: str, message: str
) -> None:
    import os

    _write(tmp_path / "a.jsonl", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("x")
    (tmp_path / "links").mkdir()
    for name in ("dangling.jsonl", "links/dangling.jsonl"):
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / "void.jsonl").write_text("\n\n")
    (tmp_path / "rows.xlsx").write_text("x")
    os.mkfifo(tmp_path / "fifo.jsonl")
    [problem] = _refused(tmp_path, path=path)
    assert message in problem.message
    assert problem.key == key
    assert problem.hint


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    _write(tmp_path / "else/b.jsonl", "b")
    _write(tmp_path / "rows/a.jsonl", "a")
    (tmp_path / "rows/there").symlink_to(tmp_path / "else")
    (tmp_path / "rows/loop").symlink_to(tmp_path / "rows")
    assert _texts(tmp_path, path="rows") == ["a", "b"]


def test_a_file_that_may_not_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.jsonl", "a")

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    [problem] = _refused(tmp_path, path="a.jsonl")
    assert problem.message == f"`{path}` cannot be read: Permission denied"


def test_found_files_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.jsonl", "a")
    monkeypatch.chdir(tmp_path)
    found = find_row_files("./a.jsonl", split="train", base_dir=Path(), key="data")
    assert found.files == [tmp_path / "a.jsonl"]


def test_the_format_is_told_from_the_rows_of_all_files(tmp_path: Path) -> None:
    rows = '{"question": "a", "answer": "b"}\n'
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sources, notes = _fetch(tmp_path, path="*.jsonl", format="auto")
    [source] = sources.train
    assert (source.format, source.num_rows) == ("qna_no_ctx", 2)
    assert source.format_why in notes[0]
    _write(tmp_path / "b.jsonl", "x")
    [problem] = _refused(tmp_path, path="*.jsonl", format="auto")
    assert "rows that are not alike" in problem.message
    (tmp_path / "c.jsonl").write_text("{\n")
    [problem] = _refused(tmp_path, path="c.jsonl", format="auto")
    assert problem.message.startswith("not JSON")


def test_a_mistake_in_no_file_is_shown_where_the_recipe_says_it(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", "a")
    marks = Marks()
    at = Location("r.yaml", 7, 3)
    marks.values[("data", "mixture", 1, "path")] = at
    parts: list[dict[str, Any]] = [{"path": name, "format": "text"} for name in ("a.jsonl", "b")]
    options = DataOptions.model_validate({"mixture": parts})
    with pytest.raises(RecipeError) as caught:
        fetch_data(options, base_dir=tmp_path, report=[].append, marks=marks)
    [problem] = caught.value.problems
    assert problem.location == at


def test_a_file_that_grows_while_it_is_read_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.jsonl", "a")

    def check_and_grow(source: Any, **options: Any) -> Any:
        found = check_source(source, **options)
        path.write_text(path.read_text() * 2)
        return found

    monkeypatch.setattr("fsdpq.fetch.data.check_source", check_and_grow)
    with pytest.raises(FetchError, match="changed while it was read"):
        _fetch(tmp_path, path="a.jsonl")


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "validation.jsonl", "test.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
         "data/test-00000-of-00001.jsonl"],
        ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
        ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"],
        ["my_train_rows.jsonl", "my-eval-rows.jsonl"],
        ["a.jsonl", "b/c.jsonl"],
    ],
)  # fmt: skip
def test_splits_are_those_that_datasets_finds(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        _write(tmp_path / "rows" / name, name)
    builder = datasets.load_dataset_builder(str(tmp_path / "rows"), cache_dir=str(tmp_path / "c"))
    theirs = {
        str(split): sorted(Path(file) for file in files)
        for split, files in (builder.config.data_files or {}).items()
    }
    ours = {
        split: find_row_files("rows", split=split, base_dir=tmp_path, key="data").files
        for split in theirs
    }
    assert ours == theirs
    assert sum(map(len, ours.values())) == len(names)
