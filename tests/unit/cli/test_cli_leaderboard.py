"""The table of a sweep fits the terminal and says what matters."""

from __future__ import annotations

import re

import click
import pytest
from support.sweeps import losses, make_results, make_trial

from fsdpq.cli.sweeps.leaderboard import render_leaderboard

GOLDEN = """\
5 trials: 2 finished, 1 hopeless, 1 failed, 1 skipped

  #  trial     status    quantization  rank  eval_loss  tokens_per_s
* 1  00000001  finished  hqq           16       1.5000         900.5
  2  00000000  finished  bnb           8        2.5000         400.2
     00000004  hopeless  bnb           8        3.9000
     00000002  failed    bnb           32
     00000003  skipped   hqq           64

hopeless  00000004 (quantization=bnb, adapter.rank=8)
  held-out loss 3.9 at step 20: the median of 4 others is 2.4
failed  00000002 (quantization=bnb, adapter.rank=32)
  rank 1: OutOfMemoryError: CUDA out of memory
skipped  00000003 (quantization=hqq, adapter.rank=64)
  needs 26.1 GiB per rank, device has 24.0 GiB"""


def settings(base, rank):
    return {"quantization": base, "adapter.rank": rank}


@pytest.fixture
def results():
    return make_results(
        make_trial(0, settings=settings("bnb", 8), eval_loss=2.5, tokens_per_s=400.25),
        make_trial(1, settings=settings("hqq", 16), eval_loss=1.5, tokens_per_s=900.5),
        make_trial(2, settings=settings("bnb", 32), status="failed",
                   reason="rank 1: OutOfMemoryError: CUDA out of memory"),
        make_trial(3, settings=settings("hqq", 64), status="skipped",
                   reason="needs 26.1 GiB per rank, device has 24.0 GiB"),
        make_trial(4, settings=settings("bnb", 8), status="hopeless", eval_loss=3.9,
                   reason="held-out loss 3.9 at step 20: the median of 4 others is 2.4"),
    )  # fmt: skip


def render(results, width=100):
    return click.unstyle("\n".join(render_leaderboard(results, width=width)))


def test_table_of_a_sweep(results):
    assert render(results) == GOLDEN


def table_lines(text):
    return [line for line in text.splitlines() if re.match(r"(\*|  #| {3,}|  \d)", line)]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_table_fits_whatever_recipes_say(width):
    trials = [
        make_trial(i, eval_loss=1.0 + i, train_loss=2.0 + i, tokens_per_s=3.0 + i, settings={
            "data.path": f"/a/long/path/to/the/rows/of/number-{i}-that-goes-on.jsonl",
            "model.name_or_path": "漢字" * 20 + str(i), "optimizer.lr": 1e-4 * (i + 1),
            "training.eval_interval": 10 + i, "adapter.rank": i,
        })
        for i in range(3)
    ]  # fmt: skip
    lines = table_lines(render(make_results(*trials), width))
    assert len(lines) == 4
    for line in lines:
        columns = sum(2 if ord(c) > 0x2E80 else 1 for c in line)
        assert columns <= width
    assert "eval_loss" in lines[0]  # the goal stays when other measures go
    assert "…" in lines[1]


def test_cut_cells_keep_what_tells_them_apart():
    trials = [make_trial(i, eval_loss=1.0 + i, settings={"data.path": f"{'x' * 90}{i}"})
              for i in range(2)]  # fmt: skip
    lines = table_lines(render(make_results(*trials), 60))
    assert "x0 " in lines[1]
    assert "x1 " in lines[2]


def test_best_is_coloured_and_colours_are_separate_from_the_text(results):
    lines = list(render_leaderboard(results))
    assert lines[3].startswith("\x1b[32m\x1b[1m* 1")
    assert "\x1b" not in lines[4]


def test_recipes_cannot_steer_the_terminal():
    trial = make_trial(0, status="failed", reason="\x1b[2J\x07boom", settings={"a": "\x1b[2J"})
    text = "\n".join(render_leaderboard(make_results(trial, *losses(1.0)[:0])))
    assert "\x1b[2J" not in text
    assert "boom" in text


def test_long_sweeps_are_cut():
    failed = [make_trial(i, status="failed", reason=f"reason {i}") for i in range(100, 120)]
    text = render(make_results(*losses(*range(1, 31)), *failed))
    assert "and 30 more in results.csv" in text
    assert "and 12 more reasons in results.csv" in text


def test_trials_with_one_reason_are_one_line():
    skipped = [make_trial(i, status="skipped", reason="needs 26.1 GiB") for i in range(30)]
    text = render(make_results(*skipped))
    assert "skipped  00000000 (adapter.rank=8) and 29 more\n  needs 26.1 GiB" in text


def test_sweep_without_trials():
    assert render(make_results()) == "0 trials"
