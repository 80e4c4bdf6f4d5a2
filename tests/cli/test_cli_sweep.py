"""`fsdpq sweep` on the command line: lines in a pipe, moving ones in a terminal, Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_trials import FAKE_TRAIN, RECIPE
from support.terminals import Terminal

from fsdpq.cli.main import main
from fsdpq.errors import ExitCode
from fsdpq.sweep.running.request import SweepRequest

SLOW_RECIPE = RECIPE.replace("loss=rank+lr", "loss=rank+lr step_s=STEP")
CODE = f"""
import sys
from fsdpq.cli.main import main
from fsdpq.sweep.running.request import SweepRequest
SweepRequest.__init__.__defaults__ = (*SweepRequest.__init__.__defaults__[:-1], {FAKE_TRAIN!r})
main(sys.argv[1:])
"""
"""Trials are trained by a stand-in."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("CI", raising=False)
    defaults = SweepRequest.__init__.__defaults__ or ()
    monkeypatch.setattr(SweepRequest.__init__, "__defaults__", (*defaults[:-1], FAKE_TRAIN))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    write_recipe(tmp_path, step_s=0)
    return tmp_path


def write_recipe(folder: Path, *, step_s: float) -> None:
    (folder / "recipe.yaml").write_text(SLOW_RECIPE.replace("STEP", str(step_s)))


def run(*arguments: str) -> int:
    try:
        main(["sweep", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


SWEEP = ("recipe.yaml", "adapter.rank=8,4", "--out", "out")


@pytest.mark.usefixtures("folder")
def test_lines_tell_what_happens_and_the_table_what_came_of_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(*SWEEP, "--list") == 0
    first, second = (line.split() for line in capfd.readouterr().out.splitlines())
    assert (first[1:], second[1:]) == (["waiting", "adapter.rank=8"], ["waiting", "adapter.rank=4"])
    assert run(*SWEEP) == 0
    out, err = capfd.readouterr()
    assert out == "out\n"
    lines = err.splitlines()
    assert lines[0] == f"{first[0]} starts: adapter.rank=8"
    assert f"{first[0]} step 2  held-out loss 12.0010" in lines
    assert any(line.startswith(f"{second[0]} finished in ") for line in lines)
    assert "2 trials: 2 finished" in lines
    [best] = [line for line in lines if line.startswith("*")]
    assert best.split()[1:4] == ["1", second[0], "4"]
    assert "best       out/best.yaml" in lines
    assert Path("out/report.html").is_file()

    assert run("out", "--quiet", "--json", "--fail-if", "eval_loss>5") == ExitCode.RUN_FAILED
    out, err = capfd.readouterr()
    assert [trial["id"] for trial in json.loads(out)["trials"]] == [second[0], first[0]]
    assert "starts" not in err
    assert run("out", "--list", "--json") == 0
    listed = json.loads(capfd.readouterr().out)["trials"]
    assert [row["status"] for row in listed] == ["finished", "finished"]


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    write_recipe(folder, step_s=0.2)
    paths = os.pathsep.join(path for path in sys.path if path)
    (folder / "command.py").write_text(
        f"import sys\nsys.path[:0] = {paths.split(os.pathsep)!r}\n{CODE}"
    )
    shown = Terminal(["command.py", "sweep", *SWEEP], folder, columns=100)
    yield shown
    shown.close()


def test_a_terminal_shows_a_moving_line_and_ctrl_c_saves(terminal: Terminal, folder: Path) -> None:
    moving = terminal.wait(r"adapter\.rank=8.*step 2/6  loss \d+\.\d+")
    assert "trials" in moving
    terminal.send("\x03")
    terminal.wait("interrupted in .*")
    terminal.wait("go on with `fsdpq sweep out`")
    assert terminal.end() == ExitCode.SAVED
    assert run(*SWEEP) == 0
    statuses = [json.loads(p.read_text())["status"] for p in folder.glob("out/outcomes/*.json")]
    assert statuses == ["finished", "finished"]
