"""``fsdpq data inspect`` as a whole: one worker that counts, and every text that comes of it.

``FSDPQ_GOLDEN=write`` writes the texts and the content in ``inspection/`` anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from support.tokenizer import build_tokenizer

from fsdpq.cli.data import list_problems
from fsdpq.cli.inspection import render_inspection, render_row
from fsdpq.cli.main import main
from fsdpq.launch.inspect import find_wanted_row
from fsdpq.rows.source import DataSources, RowSource, SourceFile

GOLDEN = Path(__file__).parent / "inspection"
Ended = tuple[int, str, str]
Run = Callable[..., Ended]

RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "rows",
    "model": {"name_or_path": "model", "dtype": "fp32"},
    "quantization": {"kind": "bnb"},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "data": {"path": "rows.jsonl", "seq_len": 48, "eval_fraction": 0.1},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "lr_scheduler": {"kind": "constant"},
    "training": {"steps": 5, "seed": 3},
}


def planted_lines() -> list[str]:
    """Returns 60 good rows, and among them some of each sort that is counted."""

    def chat(question: str, answer: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages})

    lines = [chat(f"What is {n}?", "one two three " * (1 + n % 7)) for n in range(60)]
    lines.insert(5, '{"messages": [')
    lines.insert(9, '{"prompt": "x"}')
    lines.insert(20, lines[3])
    lines.insert(30, chat("red", " "))
    lines.insert(40, chat("\x1b[2J\u202eevil <|im_end|>", "\x1b]0;x\x07 你好"))
    return lines


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    build_tokenizer().save_pretrained(root / "model")
    (root / "rows.jsonl").write_text("\n".join(planted_lines()) + "\n", encoding="utf-8")
    (root / "my.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return root


@pytest.fixture
def run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs the command line in the directory."""
    monkeypatch.chdir(directory)

    def run_it(*arguments: str) -> Ended:
        code = 0
        try:
            main(["data", "inspect", "my.yaml", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    return run_it


@pytest.fixture
def content() -> dict[str, Any]:
    return json.loads((GOLDEN / "content.json").read_text(encoding="utf-8"))


def compare(name: str, text: str) -> None:
    """Compares with a golden file, or writes it."""
    path = GOLDEN / name
    if os.environ.get("FSDPQ_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "FSDPQ_GOLDEN=write accepts the new text"


def test_everything_is_in_the_json_answer(run: Run, directory: Path) -> None:
    code, out, _ = run("--json", "--html", "page.html", "--rows", "2")
    answer = json.loads(out)
    assert (code, answer["ok"]) == (2, False)
    first, *rows = answer["problems"]
    assert first["message"] == "2 of 65 rows cannot be used"
    assert [problem["location"]["line"] for problem in rows] == [6, 10]
    assert out.isascii(), "no character of a row reaches the terminal"
    text = json.dumps(answer, indent=1, ensure_ascii=True).replace(f"{directory}/", "")
    compare("content.json", text + "\n")
    page = (directory / "page.html").read_text(encoding="utf-8")
    assert "not of the format" in page
    assert "\x1b" not in page


def test_text_of_an_inspection(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    lines = render_inspection(content, color=False)
    compare("terminal.txt", click.unstyle("\n".join(lines)) + "\n")


def test_colour_changes_no_letter(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    coloured = [click.unstyle(line) for line in render_inspection(content, color=True)]
    plain = [click.unstyle(line) for line in render_inspection(content, color=False)]
    legend = "rows as the model reads them"
    for one, other in zip(coloured, plain, strict=True):
        if not one.startswith(legend):
            assert one == other.replace("⟦", "").replace("⟧", "")
    assert "\x1b" not in "".join(coloured)


def test_row_is_shown_with_its_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    code, out, err = run("--row", "41")
    assert (code, "2 of 65 rows cannot be used" in err) == (2, True)
    name, rest = out.split("\n", 1)
    assert name.startswith("row 41 of /")
    assert "\x1b" not in out
    compare("row.txt", rest)


def test_bad_row_is_shown_with_its_mistake(content: dict[str, Any]) -> None:
    shown = {"place": {"file": "/d/rows.jsonl", "row": 6}, "content": '{"messages": [',
             "mistake": "not JSON"}  # fmt: skip
    lines = list(render_row(content | {"row": shown}, color=False))
    assert lines[:2] == ["\x1b[1mrow 6 of /d/rows.jsonl\x1b[0m", '  {"messages": [']
    assert lines[-1].endswith(" not JSON")


def test_made_up_rows_are_nothing_to_look_at(run: Run) -> None:
    code, out, err = run("data.path=null", "data.format=dummy", "data.eval_fraction=0")
    assert (code, out) == (2, "")
    assert "`data.format: dummy` makes up rows" in err


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("3", "is no such"), ("b.jsonl:3", "/d/b.jsonl"), ("d/a.jsonl:1", "/d/a.jsonl"),
     ("x.jsonl:3", "no file is called"), ("a.jsonl:0", "is no row"), ("a.jsonl:x", "is no row")],
)  # fmt: skip
def test_row_is_named_by_its_file_where_there_are_several(wanted: str, found: str) -> None:
    from fsdpq.errors import UsageError

    files = tuple(SourceFile(Path("/d") / name, "") for name in ("a.jsonl", "b.jsonl"))
    data = DataSources((RowSource("d", files, "messages", 0),))
    if found.startswith("/"):
        assert find_wanted_row(data, wanted)[0] == found
        return
    with pytest.raises(UsageError) as caught:
        find_wanted_row(data, wanted)
    assert found in caught.value.message or "several files" in caught.value.message
    one = DataSources((RowSource("d", files[:1], "messages", 0),))
    if wanted == "3":
        assert find_wanted_row(one, wanted) == ("/d/a.jsonl", 3)


def test_problems_are_none_where_a_run_would_start(content: dict[str, Any]) -> None:
    assert [p.message.split(":")[0] for p in list_problems(content)] == [
        "2 of 65 rows cannot be used",
        "not JSON", "no `messages` in this row (it has `prompt`)",
    ]  # fmt: skip
    assert list_problems(content | {"errors": []}) == []


def test_page_that_cannot_be_written_is_an_error(content: dict[str, Any], tmp_path: Path) -> None:
    from fsdpq.cli.data import write_page
    from fsdpq.errors import UsageError

    with pytest.raises(UsageError, match="cannot be written"):
        write_page(tmp_path / "no" / "page.html", content)
