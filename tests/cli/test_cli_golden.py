"""Every text of the command line that users see, as data: one file a case in ``golden/``.

A case starts with its set-up in YAML: ``run`` (the command line after ``fsdpq``), and optionally
``replace`` (pairs of old and new text in the quickstart recipe, which becomes ``my.yaml``) or
``write`` (the whole ``my.yaml``). The exit code and both outputs follow. ``FSDPQ_GOLDEN=write
pytest tests/cli/test_cli_golden.py`` writes them anew; read the diff before committing it.
"""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from fsdpq.cli.main import main

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*.txt"))
MIN_ERROR_TEXTS = 40


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What is installed, and which GPUs there are, differs from machine to machine.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)


def run_case(setup: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what a case prints, in the form of the golden files."""
    case = yaml.safe_load(setup)
    text = case.get("write") or (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    Path("ok.yaml").write_text(text, encoding="utf-8")
    for old, new in case.get("replace", []):
        assert old in text, old
        text = text.replace(old, new)
    Path("my.yaml").write_text(text, encoding="utf-8")
    code = 0
    try:
        main(shlex.split(case["run"]))
    except SystemExit as end:
        code = int(end.code or 0)
    found = capsys.readouterr()
    return f"--- exit {code}\n--- stdout\n{found.out}--- stderr\n{found.err}"


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_golden(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup, _, expected = path.read_text(encoding="utf-8").partition("--- exit")
    found = run_case(setup, capsys)
    assert "Traceback" not in found
    if os.environ.get("FSDPQ_GOLDEN") == "write":
        path.write_text(setup + found, encoding="utf-8")
        return
    assert found == f"--- exit{expected}", "FSDPQ_GOLDEN=write accepts the new text"


def test_there_are_enough_error_texts() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in CASES)
    assert texts.count("\nerror: ") >= MIN_ERROR_TEXTS
