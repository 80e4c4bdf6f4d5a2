"""The screen: plain in a pipe, a bar on a terminal, and nothing that a model wrote gets through."""

import io
import threading
import time
from pathlib import Path

import pytest
from support.terminals import shown

from fsdpq.cli.render import clean, wants_color
from fsdpq.cli.run_texts import format_seconds
from fsdpq.cli.screen import open_screen
from fsdpq.cli.screens import bar
from fsdpq.cli.screens.bar import BottomLine, Part, bar_text, fit
from fsdpq.cli.screens.live import LiveScreen
from fsdpq.cli.screens.plain import PlainScreen
from fsdpq.cli.screens.quiet import QuietScreen
from fsdpq.cli.sweeps.screen import LiveSweepScreen, PlainSweepScreen, open_sweep_screen
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
    text = stream.getvalue()
    assert f"4.9 M {weights} (3.63 %)" in text
    assert f"exporting the {exported}\n" in text


def test_pipe_gets_few_plain_step_lines() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for number, at in ((1, 0.0), (2, 1.0), (3, 6.0), (10, 6.1)):
        screen.show_row(step(number, at))
    assert stream.getvalue().splitlines() == [
        "step  1/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta --:--",
        "step  3/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta 0:21",
        "step 10/10  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta 0:00",
    ]


def load(done: int, at: float) -> Row:
    return {"event": "load", "done_bytes": done * 2**28, "total_bytes": 2**32, "time": at}


def test_pipe_gets_few_plain_load_lines() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for done, at in ((0, 50.0), (2, 51.0), (5, 55.0), (8, 56.0), (16, 58.0)):
        screen.show_row(load(done, at))
    assert stream.getvalue().splitlines() == [
        "loaded 1.25 GiB of 4.00 GiB  256.00 MiB/s  eta 0:11",
        "loaded 4.00 GiB of 4.00 GiB  512.00 MiB/s  eta 0:00",
    ]


def test_a_short_load_needs_no_line() -> None:
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


def test_terminal_gets_a_line_that_moves_by_carriage_returns_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(bar, "DRAW_INTERVAL_S", 0.0)
    stream = Terminal()
    screen = open_screen(stream)
    assert isinstance(screen, LiveScreen)
    screen.show_row({"event": "phase", "name": "load", "detail": ""})
    screen.show_row({"event": "load", "done_bytes": 2**29, "total_bytes": 2**30, "time": 0.0})
    screen.show_row({"event": "notice", "message": "[bold]as it is[/bold]"})
    screen.show_row(step(1, 0.0))
    screen.show_row(step(10, 9.0))
    screen.close()
    text = stream.getvalue()
    assert "\x1b" not in text, "no cursor is hidden or moved: a killed run leaves a usable terminal"
    assert shown(text) == [
        "loading the base",
        "note: [bold]as it is[/bold]",
        "load  ━━━━━━━━━━━━────────────  512.00 MiB of 1.00 GiB",
        f"step 10/10  {'━' * 24}  loss 2.5000  lr 5.00e-04  812 tokens/s  1.00 GiB  eta 0:00",
        "",
    ]


def test_a_short_line_leaves_nothing_of_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    line = BottomLine(stream)
    for width, text in (("60", "a" * 80), ("60", "b" * 10), ("20", "c" * 80)):
        monkeypatch.setenv("COLUMNS", width)
        line.draw([Part(text, 0)], is_last=True)
    line.end()
    assert shown(stream.getvalue()) == ["c" * 19, ""]
    assert f"\r{'b' * 10}{' ' * 49}" in stream.getvalue()


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (200, "step 4/10  ━━  loss 2.5000  lr 5e-4  812 tokens/s  1.00 GiB  eta 0:07  saved 3"),
        (60, "step 4/10  ━━  loss 2.5000  812 tokens/s  eta 0:07  saved 3"),
        (35, "step 4/10  loss 2.5000  eta 0:07"),
        (5, "step 4/10"),
    ],
)
def test_a_narrow_terminal_gets_what_matters_most(width: int, text: str) -> None:
    parts = [
        Part("step 4/10", 0), Part("━━", 4, True), Part("loss 2.5000", 1), Part("lr 5e-4", 6),
        Part("812 tokens/s", 3), Part("1.00 GiB", 7), Part("eta 0:07", 2), Part("saved 3", 5),
    ]  # fmt: skip
    assert "  ".join(part.text for part in fit(parts, width)) == text


@pytest.mark.parametrize(("variable", "wait"), [("", 0.05), ("COLAB_RELEASE_TAG", 0.95)])
def test_a_line_is_drawn_a_few_times_a_second_and_less_often_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, variable: str, wait: float
) -> None:
    waits: list[float] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            waits.append(self.interval)

    monkeypatch.setattr(bar.threading, "Timer", Timer)
    monkeypatch.setattr(bar.time, "monotonic", lambda: now)
    if variable:
        monkeypatch.setenv(variable, "release")
    stream, now = Terminal(), 100.0
    line = BottomLine(stream)
    line.draw([Part("first", 0)])
    now += 0.05
    line.draw([Part("second", 0)])
    line.draw([Part("third", 0)])
    assert (stream.getvalue(), waits) == ("\rfirst", [pytest.approx(wait)])
    now += wait + 0.001
    line.draw([Part("fourth", 0)])
    assert stream.getvalue() == "\rfirst\rfourth"


def test_the_last_of_many_draws_is_seen_a_moment_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar, "DRAW_INTERVAL_S", 0.01)
    stream = Terminal()
    line = BottomLine(stream)
    for number in range(3):
        line.draw([Part(f"number {number}", 0)])
    deadline = time.monotonic() + 10
    while "number 2" not in stream.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_bars_are_of_characters_that_the_terminal_has() -> None:
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert bar_text(1, 2, latin) == "#" * 12 + "." * 12
    assert bar_text(0, 0, latin) == "." * 24


def test_a_sweep_in_a_notebook_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("CI", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(open_sweep_screen(Terminal()), LiveSweepScreen)
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert type(open_sweep_screen(Terminal())) is PlainSweepScreen


def test_quiet_shows_nothing() -> None:
    stream = Terminal()
    screen = open_screen(stream, quiet=True)
    assert isinstance(screen, QuietScreen)
    screen.report("a line")
    for row in (SETUP, step(1, 0.0), {"event": "notice", "message": "x"}):
        screen.show_row(row)
    screen.close()
    screen.show_summary()
    assert stream.getvalue() == ""


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
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_color(io.StringIO())
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


def test_time_between_two_starts_is_no_time_of_training() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    screen.show_row(step(1, at=0.0))
    screen.show_row(RESUMED)
    screen.show_row(step(8, at=1000.0))
    screen.show_row(step(9, at=1006.0))
    assert stream.getvalue().splitlines()[-1].endswith("eta 0:06")


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
