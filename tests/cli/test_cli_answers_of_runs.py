"""`generate` and `chat` without a model: what goes where, commands, Ctrl-C, terminals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import pytest
from support.finished import FAKE_ANSWERER, finished_run

from fsdpq.cli.answering.chat import HELP
from fsdpq.cli.answering.chat_input import ChatInput
from fsdpq.cli.answering.options import LoadLine, shown
from fsdpq.cli.main import main
from fsdpq.launch import answers, generate


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, and a worker without a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers.AnswerSession.__init__, "__kwdefaults__", {"worker": FAKE_ANSWERER})
    monkeypatch.setitem(generate.generate.__kwdefaults__, "worker", FAKE_ANSWERER)
    return finished_run(tmp_path).root


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = 0
        try:
            main(arguments)
        except SystemExit as end:
            self.code = end.code
        captured = capsys.readouterr()
        self.out, self.err = captured.out, click.unstyle(captured.err)


def run_with(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    *arguments: str,
) -> Ran:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return Ran(capsys, *arguments)


def test_generate_prints_the_answer_only(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran(capsys, "generate", str(run_dir), "--prompt", "capital?")
    assert (ran.code, ran.out) == (0, "as capital?\n")
    assert ran.err == "note: know this\n"
    ran = run_with(
        capsys, monkeypatch, "piped\n", "generate", str(run_dir), "--prompt=-", "--stream"
    )
    assert (ran.code, ran.out) == (0, "as piped\n")
    # For a program the text is as it came.
    assert (
        Ran(capsys, "generate", str(run_dir), "--prompt=control").out == "\x1b[2Jred\ttab\nline\n"
    )


def test_generate_tells_what_an_answer_took(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, "generate", str(run_dir), "--prompt", "x", "--json")
    assert json.loads(ran.out) == {
        "answer": "as x", "stop": "end", "num_tokens": 2, "num_prompt_tokens": 1,
        "tokens_per_s": 2.0,
    }  # fmt: skip
    refused = Ran(capsys, "generate", str(run_dir), "--prompt", "refuse", "--json")
    assert refused.code == 2
    assert json.loads(refused.out)["problems"][0]["message"] == "no"


def test_generate_answers_a_file_row_by_row(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "id": 1}\n{"prompt": "refuse", "id": 2}\n')
    ran = Ran(capsys, "generate", str(run_dir), "--file", "rows.jsonl", "--system", "brief")
    first, second = (json.loads(line) for line in ran.out.splitlines())
    assert (first["id"], first["answer"], first["num_prompt_tokens"]) == (1, "as a", 2)
    assert (second["id"], second["error"], "answer" in second) == (2, "no", False)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == "1 of the rows have no answer: see their `error`"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either `--prompt` or `--file`"),
        (("--prompt", "x", "--file", "y"), "give either `--prompt` or `--file`"),
        (("--prompt", "x", "--stream", "--json"), "`--stream` prints text"),
        (("--prompt", "x", "--top-p", "0"), "0<x<=1"),
        (("--prompt", "x", "--checkpoint", "3"), "has no checkpoints"),
    ],
)
def test_generate_refuses_what_makes_no_sense(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    ran = Ran(capsys, "generate", str(run_dir), *arguments)
    assert ran.code == 2
    assert message in ran.err + ran.out


def test_a_run_whose_base_is_gone_says_so(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = {"inputs": {"model": {"directory": "/no/such/base"}}}
    (run_dir / "run.lock.json").write_text(json.dumps(lock))
    for arguments in (("generate", str(run_dir), "--prompt", "x"), ("chat", str(run_dir))):
        ran = Ran(capsys, *arguments)
        assert ran.code == 2
        assert "is gone: there is no `/no/such/base`" in ran.err


def chat(
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    *arguments: str,
) -> Ran:
    return run_with(capsys, monkeypatch, lines, "chat", str(run_dir), *arguments)


def test_lines_of_a_pipe_are_answered_one_by_one(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'one\n\nfirst\\\nsecond\n"""\na\n\nb\n"""\n//slash\nrefuse\ncontrol\nlast'
    ran = chat(run_dir, capsys, monkeypatch, lines)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "as one", "as first", "second", "as a", "", "b", "as /slash",
        "␛[2Jred    tab", "line", "as last",
    ]  # fmt: skip
    assert "(no; ask another)" in ran.err
    assert ran.err.startswith("run: lora on pypi:smollm2-135m-instruct\nCPU, fp32, context of 64")
    assert "> " not in ran.out + ran.err


def test_commands_change_the_conversation(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "/info", "one", "two", "/info", "/undo", "/save talk.jsonl", "/retry", "/base", "/retry",
        "/base", "/system be kind", "three", "/save talk.jsonl", "drop", "/temperature", "/reset",
        "/save x.txt", "/nonsense", "/temperature 0", "/help", "/exit", "never",
    ]  # fmt: skip
    ran = chat(run_dir, capsys, monkeypatch, "\n".join(lines), "--system", "first")
    assert ran.out.splitlines() == [
        "as one", "as two", "as one", "as before", "as three", "as drop",
    ]  # fmt: skip
    rows = [json.loads(line)["messages"] for line in Path("talk.jsonl").read_text().splitlines()]
    assert [[message["content"] for message in row] for row in rows] == [
        ["first", "one", "as one"], ["be kind", "three", "as three"],
    ]  # fmt: skip
    for note in (
        "(nothing was answered yet)",
        "(4 tokens before it, 1 of them known already",
        "(taken back: two)",
        "(answers come from the model as it was before training;",
        "(begun anew under that system prompt)",
        "no longer sees its first 1 turns",
        "(the temperature is 0.7; /temperature 0.7)",
        "(there is no turn to save)",
        "(there is no `/nonsense`: /help lists the commands)",
        "(temperature 0)",
    ):
        assert note in ran.err, note
    assert all(f"  {name}" in ran.err for name in HELP)


def test_an_answer_stays_where_another_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = chat(run_dir, capsys, monkeypatch, "once\n/retry\n/save talk.jsonl\n")
    assert "(no; ask another)" in ran.err
    [row] = [json.loads(line)["messages"] for line in Path("talk.jsonl").read_text().splitlines()]
    assert [message["content"] for message in row] == ["once", "as once"]


def test_rows_without_turns_are_asked_one_at_a_time(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "single")
    ran = chat(run_dir, capsys, monkeypatch, "one\ntwo\n/info\n/system x\n")
    assert ran.out.splitlines() == ["as one", "as two"]
    assert "rows of the format `alpaca` have no turns" in ran.err
    assert "(1 tokens before it" in ran.err
    assert "(there is no place for a system prompt" in ran.err
    refused = chat(run_dir, capsys, monkeypatch, "one\n", "--system", "x")
    assert refused.code == 2
    assert "have no place for a system prompt" in refused.err


def test_a_chat_that_cannot_compare_says_why(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "one")
    ran = chat(run_dir, capsys, monkeypatch, "/base\n")
    assert "(memory does not hold both; start another chat with --base)" in ran.err
    ran = chat(run_dir, capsys, monkeypatch, "/base\nx\n", "--base")
    assert "(this chat was started with --base" in ran.err
    assert ran.out == "as x\n"


def test_a_chat_whose_worker_dies_ends_with_its_reason(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = chat(run_dir, capsys, monkeypatch, "one\ndie\nnever\n")
    assert ran.code == 1
    assert ran.out == "as one\n"
    assert "error: the worker was killed (SIGKILL)" in ran.err


class Terminal(io.StringIO):
    """Text that pretends to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_text_of_a_model_cannot_move_the_cursor() -> None:
    text = "a\x1b[31mb\r\x07c\u202e\tnext\nline 👩‍🚀 שלום"
    assert shown(text, Terminal()) == "a␛[31mb␍␇c⟨U+202E⟩    next\nline 👩‍🚀 שלום"


def test_the_line_of_loading_leaves_nothing_behind() -> None:
    stream = Terminal()
    line = LoadLine(stream)
    line.start()
    for done in (1, 1, 50, 100):
        line.take(done, 100)
    line.clear()
    line.clear()
    written = stream.getvalue()
    assert written == (
        "\rloading\rloading 1 %\rloading 50 %\rloading 100 %\r" + " " * len("loading 100 %") + "\r"
    )


class Typed:
    """Lines of a terminal whose output is elsewhere, and Ctrl-C as ``None``."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = list(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        if not self._lines:
            return ""
        line = self._lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line


def read_all(*lines: str | None) -> tuple[list[Any], str]:
    errors = Terminal()
    reader = ChatInput(Typed(*lines), io.StringIO(), errors)  # pyright: ignore
    found = [reader.read("> ")]
    while found[-1] is not None:
        found.append(reader.read("> "))
    return found[:-1], errors.getvalue()


def test_ctrl_c_twice_in_a_row_ends_a_chat_and_once_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert read_all("one\n", None, "two\n", None, "three\n", None, None, "never\n")[0] == [
        "one", "two", "three",
    ]  # fmt: skip
    assert capsys.readouterr().err.count("Ctrl-C again") == 3


def test_a_prompt_never_goes_into_redirected_output() -> None:
    found, prompts = read_all("one \\\n", "two\n", '"""quoted\n', 'more"""\n', "open\\\n")
    assert found == ["one \ntwo", "quoted\nmore", "open\n"]
    assert prompts == "> ... > ... > ... > "
