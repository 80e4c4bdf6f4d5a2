"""The text of every message, as the user sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fsdpq.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    Path("ok.yaml").write_text(text, encoding="utf-8")
    Path("my.yaml").write_text(text.replace("  rank: 16\n", "  lora_rnak: 16\n"), encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "validate", "my.yaml") == (
        2,
        "",
        """\
error: unknown key `lora_rnak` in `adapter` (kind `lora`)
  --> my.yaml:27:3
   27 |   lora_rnak: 16
          ^^^^^^^^^
hint: did you mean `rank`?
""",
    )


def test_two_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "validate", "ok.yaml", "adapter.rank=1,2", "training.epochs=many") == (
        2,
        "",
        """\
error: `adapter.rank=1,2` is a sweep, and one run needs one value
  --> command line: adapter.rank=1,2
hint: write `section.field=value`; `fsdpq sweep` tries one value after another

error: `training.epochs` must be a number greater than 0 or null, not `many`
  --> command line: training.epochs=many
hint: change it
""",
    )


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "validate", "no.yaml") == (
        2,
        "",
        """\
error: there is no recipe `no.yaml`
hint: `recipes/quickstart.yaml` is a recipe to start from
""",
    )


def test_missing_section(capsys: pytest.CaptureFixture[str]) -> None:
    Path("few.yaml").write_text("version: 1\nname: few\n")
    _, _, err = run(capsys, "validate", "few.yaml")
    assert err.splitlines()[:3] == [
        "error: missing section `model`",
        "  --> few.yaml",
        "hint: add `model:`; `recipes/quickstart.yaml` shows every section",
    ]
    assert err.count("error: missing section") == 2


def test_python_tag(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("version: 1\nname: !!python/name:os.system x\n")
    _, _, err = run(capsys, "validate", "bad.yaml")
    assert err.startswith("""\
error: the tag `!!python/name:os.system` has no place in a recipe
  --> bad.yaml:2:7
    2 | name: !!python/name:os.system x
              ^^^^^^^^^^^^^^^^^^^^^^^^^
hint: delete the tag
""")


def test_tab(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tab.yaml").write_text("model:\n\tdtype: fp32\n")
    assert run(capsys, "validate", "tab.yaml")[2] == (
        "error: a tab cannot indent YAML\n  --> tab.yaml:2:1\n"
        "    2 |  dtype: fp32\n        ^\nhint: indent with spaces\n"
    )


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Path("esc.yaml").write_bytes(b"name: '\x1b]0;owned\x07'\n")
    code, _, err = run(capsys, "validate", "esc.yaml")
    assert code == 2
    assert "\x1b" not in err
    assert "U+001B" in err


def test_long_line_is_cut_around_the_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.yaml").write_text("name: " + "x" * 5000 + "\n")
    _, _, err = run(capsys, "validate", "long.yaml")
    assert max(len(line) for line in err.splitlines()) < 200


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("validate",), "error: Missing argument 'RECIPE'\nhint: see `"),
        (("frobnicate",), "error: No such command 'frobnicate'"),
        (("show", "ok.yaml", "--nope"), "error: No such option '--nope'"),
        (("generate", "."), "error: give either `--prompt` or `--file`"),
        (
            ("generate", ".", "--prompt", "x"),
            "error: `.` is no run directory\nhint: name a directory that `fsdpq train` made",
        ),
        (
            ("generate", ".", "--prompt", "x", "--max-new-tokens", "0"),
            "error: Invalid value for '--max-new-tokens'",
        ),
        (("kinds", "adaptor"), "error: a recipe has no section `adaptor`\nhint: did you mean"),
        (
            ("train", "ok.yaml", "--run-dir", "."),
            "error: the run directory `.` exists and is not empty\nhint: name another one",
        ),
    ],
)
def test_usage_errors_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(text)


def test_too_many_ranks_exit_4(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = run(capsys, "train", "ok.yaml", "launch.device=cuda")
    assert code == 4
    assert err.startswith("error: `launch.device` is `cuda` and this machine shows no GPU\n")


def test_run_without_adapter_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.resolved.yaml").touch()
    Path("run.lock.json").touch()
    code, _, err = run(capsys, "generate", ".", "--prompt", "x")
    assert (code, err.splitlines()[0]) == (
        2, "error: the run `.` has exported nothing: it did not finish",
    )  # fmt: skip


def test_json_holds_the_same_problems(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", "my.yaml", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out) == {
        "ok": False,
        "problems": [
            {
                "message": "unknown key `lora_rnak` in `adapter` (kind `lora`)",
                "key": "adapter.lora_rnak",
                "location": {
                    "source": "my.yaml", "line": 27, "column": 3,
                    "text": "  lora_rnak: 16", "length": 9,
                },
                "hint": "did you mean `rank`?",
            }
        ],
    }  # fmt: skip
    assert json.loads(run(capsys, "validate", "ok.yaml", "--json")[1]) == {
        "ok": True, "problems": [], "notices": [],
    }  # fmt: skip
    assert json.loads(run(capsys, "validate", "no.yaml", "--json")[1])["ok"] is False


def test_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("fsdpq.recipe.load.load_recipe", fail)
    code, _, err = run(capsys, "validate", "ok.yaml")
    assert code == 1
    assert "ZeroDivisionError: inside" in err
    assert err.endswith("this is a bug in fsdpq: please report it with the lines above\n")


def test_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m fsdpq schema | head -1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("{\n", "")
