"""The screen: plain in a pipe, a bar on a terminal, and nothing that a model wrote gets through."""

import io
from pathlib import Path

import pytest

from fsdpq.cli import screen as module
from fsdpq.cli.render import clean, wants_color
from fsdpq.cli.run_texts import format_seconds
from fsdpq.cli.screen import LiveScreen, PlainScreen, open_screen
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, at: float) -> Row:
    return {
        "event": "step", "step": number, "total_steps": 10, "loss": 2.5, "lr": 5e-4,
        "tokens_per_s": 812.3, "memory_bytes": 2**30, "time": at,
    }  # fmt: skip


SETUP: Row = {
    "event": "setup", "model": "pypi:x", "num_parameters": 134_515_008,
    "num_trainable": 4_884_480, "num_quantized": 106_168_320, "num_groups": 32, "world_size": 2,
    "device": "cpu", "dtype": "fp32", "base_bytes_per_rank": [85 * 2**20, 84 * 2**20],
    "adapter_bytes_per_rank": [2**20, 2**20], "num_train_rows": 600, "num_eval_rows": 60,
    "total_steps": 10,
}  # fmt: skip


def test_setup_says_what_is_run() -> None:
    stream = io.StringIO()
    PlainScreen(stream).show_row(SETUP)
    assert (
        stream.getvalue()
        == """
  model      pypi:x, 134.5 M parameters
  quantized  106.2 M of them (78.9 %)
  trained    4.9 M adapter weights (3.63 %)
  ranks      2 x cpu, fp32, 32 FSDP groups
  per rank   base 85.00 MiB, adapter 1.00 MiB
  rows       600 to train on, 60 held out
  steps      10

"""
    )


@pytest.mark.parametrize(
    ("kind", "weights", "exported"),
    [
        ("dora", "adapter weights", "adapter"),
        ("llama_pro", "weights of new layers", "model"),
        ("none", "weights, all of the model", "model"),
    ],
)
def test_each_method_has_its_own_words(
    tmp_path: Path, kind: str, weights: str, exported: str
) -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    screen.open_run(RunFiles(tmp_path))
    screen.show_row(SETUP | {"adapter_kind": kind})
    screen.show_row({"event": "phase", "name": "export"})
    done = {"event": "done", "steps": 1, "train_s": 1.0, "adapter": f"runs/{exported}"}
    screen.show_row(done | {"peak_memory_bytes": [1]})
    screen.show_summary()
    text = stream.getvalue()
    assert f"4.9 M {weights} (3.63 %)" in text
    assert f"exporting the {exported}\n" in text
    assert f"  {exported:<12} runs/{exported}\n" in text


def test_pipe_gets_few_plain_step_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    clock = iter([100.0, 101.0, 106.0, 106.1])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    for number, at in ((1, 0.0), (2, 1.0), (3, 2.0), (10, 9.0)):
        screen.show_row(step(number, at))
    assert stream.getvalue().splitlines() == [
        "step  1/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta --:--",
        "step  3/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta 0:07",
        "step 10/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta 0:00",
    ]


def load(done: int, at: float) -> Row:
    return {"event": "load", "done_bytes": done * 2**28, "total_bytes": 2**32, "time": at}


def test_pipe_gets_few_plain_load_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    clock = iter([100.0, 101.0, 106.0, 107.0, 120.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    for done, at in ((0, 50.0), (2, 51.0), (4, 54.0), (8, 55.0), (16, 58.0)):
        screen.show_row(load(done, at))
    assert stream.getvalue().splitlines() == [
        "loaded 1.00 GiB of 4.00 GiB  256.00 MiB/s  eta 0:12",
        "loaded 4.00 GiB of 4.00 GiB  512.00 MiB/s  eta 0:00",
    ]


def test_a_short_load_needs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for done, at in ((0, 50.0), (2, 51.0), (16, 54.0)):
        screen.show_row(load(done, at))
    assert stream.getvalue() == ""


def test_terminal_shows_speed_and_time_left_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    screen = LiveScreen(stream)
    for done, at in ((0, 50.0), (2, 51.0), (4, 54.0)):
        screen.show_row(load(done, at))
    screen.close()
    assert "1.00 GiB of 4.00 GiB  256.00 MiB/s  eta 0:12" in stream.getvalue()


def test_terminal_gets_a_bar_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("CI", raising=False)
    stream = Terminal()
    screen = open_screen(stream)
    assert isinstance(screen, LiveScreen)
    screen.show_row({"event": "phase", "name": "load", "detail": ""})
    screen.show_row({"event": "load", "done_bytes": 2**29, "total_bytes": 2**30, "time": 0.0})
    screen.show_row({"event": "notice", "message": "[bold]as it is[/bold]"})
    screen.show_row(step(1, 0.0))
    screen.close()
    text = stream.getvalue()
    assert "512.00 MiB of 1.00 GiB" in text
    assert "[bold]as it is[/bold]" in text
    assert "1/10" in text
    assert text.rstrip("\n").endswith("\x1b[?25h"), "the cursor is back"


def test_ci_and_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "1")
    assert type(open_screen(Terminal())) is PlainScreen
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert type(open_screen(Terminal())) is PlainScreen


def test_answers_cannot_move_the_cursor(tmp_path: Path) -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    screen.open_run(RunFiles(tmp_path))
    row = {"event": "sample", "when": "after", "prompt": "p", "answer": "a\x1b[2Jb\nc\u202e"}
    screen.show_row(row)
    assert "\x1b" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


def test_unknown_rows_are_left_out() -> None:
    stream = io.StringIO()
    PlainScreen(stream).show_row({"event": "of a later version"})
    assert stream.getvalue() == ""


def test_color_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal())
    assert not wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())


def test_numbers_are_readable() -> None:
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == [
        "12 B", "2.00 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]
    assert clean("a\tb\x07") == "a b\N{REPLACEMENT CHARACTER}"


SAVED: Row = {
    "event": "checkpoint", "step": 4, "directory": "runs/x/checkpoints/step-00000004",
    "num_bytes": 3 * 2**20, "seconds": 0.41, "eval_loss": None, "time": 0.0,
}  # fmt: skip
RESUMED: Row = {
    "event": "resume", "step": 4, "directory": "runs/x/checkpoints/step-00000004",
    "world_size": 1, "time": 0.0,
}  # fmt: skip


def test_checkpoints_and_resumes_are_lines_and_not_many() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for number in range(4, 100):
        screen.show_row(SAVED | {"step": number})
    screen.show_row(RESUMED)
    screen.show_row(RESUMED | {"step": 0, "directory": None, "world_size": None})
    screen.show_row({"event": "stop", "signal": "SIGTERM", "time": 0.0})
    screen.show_row({"event": "stopped", "step": 5, "directory": None, "time": 0.0})
    screen.show_row({"event": "stopped", "step": 5, "directory": SAVED["directory"], "time": 0.0})
    assert stream.getvalue().splitlines() == [
        "checkpoint step-00000004: 3.00 MiB in 0.4 s",
        "going on from step 4 (step-00000004, saved by 1 rank)",
        "there is no checkpoint yet: starting at the first step",
        "SIGTERM: the ranks save after this step and end",
        "ended after step 5: nothing could be saved",
        "ended after step 5, saved in step-00000004",
    ]


def test_time_between_two_starts_is_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_INTERVAL_S", 0.0)
    stream = io.StringIO()
    screen = PlainScreen(stream)
    screen.show_row(step(1, at=0.0))
    screen.show_row(RESUMED)
    screen.show_row(step(8, at=1000.0))
    screen.show_row(step(9, at=1001.0))
    assert stream.getvalue().splitlines()[-1].endswith("eta 0:01")


def test_bar_shows_the_newest_checkpoint_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    screen = LiveScreen(stream)
    screen.show_row(step(4, at=0.0))
    for number in range(4, 100):
        screen.show_row(SAVED | {"step": number})
    screen.show_row(step(5, at=1.0))
    screen.close()
    text = stream.getvalue()
    assert "saved 99" in text
    assert "checkpoint step" not in text
