"""Numbers of a run are those of its files, once, whatever happened to the run."""

from __future__ import annotations

import json
import math

import pytest

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import append_json_line
from fsdpq.sweep.results.measures import (
    direction_of,
    format_measure,
    is_deterministic,
    is_known,
    read_measures,
)


def write_steps(files: RunFiles, steps: range, *, start: float = 0.0, shift: float = 0.0) -> None:
    """Writes logged steps, a second each, and a held-out loss after every fourth."""
    for step in steps:
        row = {"event": "step", "step": step, "loss": 4 - step / 10 + shift, "time": start + step}
        append_json_line(files.metrics, row | {"tokens_per_s": 100.0 + step})
        if step % 4 == 0:
            loss = abs(step - 8) / 10 + 2 + shift  # lowest after step 8
            append_json_line(files.metrics, {**row, "event": "eval", "loss": loss})


def begin(files: RunFiles, *, at: float) -> None:
    files.root.mkdir(exist_ok=True)
    append_json_line(files.events, {"event": "phase", "name": "data", "time": at})
    setup = {"event": "setup", "num_trainable": 4096, "time": at + 1}
    append_json_line(files.events, setup)


def end(files: RunFiles, *, at: float, loss: float | None = 2.4) -> None:
    summary = {"event": "done", "steps": 12, "train_s": 12.5, "trained_tokens": 900}
    summary |= {"eval_loss_before": 5.0, "eval_loss_after": loss, "time": at}
    summary |= {"peak_memory_bytes": [5, 7], "peak_host_bytes": [11, 9]}
    append_json_line(files.events, summary)


@pytest.fixture
def undisturbed(tmp_path) -> RunFiles:
    files = RunFiles(tmp_path / "whole")
    begin(files, at=0.0)
    append_json_line(files.metrics, {"event": "eval", "step": 0, "loss": 5.0, "time": 0.5})
    write_steps(files, range(1, 13))
    end(files, at=20.0)
    return files


def test_every_measure_of_a_finished_run(undisturbed):
    losses = [4 - step / 10 for step in range(3, 13)]  # the last ten
    assert read_measures(undisturbed) == {
        "eval_loss": 2.4,
        "best_eval_loss": 2.0,
        "perplexity": math.exp(2.4),
        "train_loss": pytest.approx(sum(losses) / 10, abs=1e-12),
        "tokens_per_s": 106.5,
        "train_s": 12.5,
        "wall_s": 20.0,
        "peak_memory_bytes": 7,
        "peak_host_bytes": 11,
        "steps": 12,
        "trained_tokens": 900,
        "num_trainable": 4096,
    }


def test_steps_that_were_done_twice_count_once(tmp_path, undisturbed):
    files = RunFiles(tmp_path / "resumed")
    begin(files, at=0.0)
    write_steps(files, range(1, 5))
    write_steps(files, range(5, 11), shift=0.7)  # void: the run goes back to step 4
    begin(files, at=1000.0)
    append_json_line(files.events, {"event": "resume", "step": 4, "time": 1001.0})
    write_steps(files, range(5, 13), start=1000.0)
    end(files, at=1020.0)
    resumed, whole = read_measures(files), read_measures(undisturbed)
    wanted = {name: value for name, value in whole.items() if is_deterministic(name)}
    assert {name: resumed[name] for name in wanted} == wanted
    assert resumed["wall_s"] == 1.0 + 20.0  # two starts, the pause between them left out


def test_what_follows_the_step_that_ended_a_trial_does_not_count(undisturbed):
    """It may be a step or all of them, by when the trial heard of it."""
    measures = read_measures(undisturbed, until=4)
    assert measures["steps"] == 4
    assert measures["eval_loss"] == measures["best_eval_loss"] == 2.4
    assert measures["train_loss"] == pytest.approx(3.75)
    assert "trained_tokens" not in measures


def test_unfinished_run_has_what_it_measured(tmp_path):
    files = RunFiles(tmp_path / "run")
    assert read_measures(files) == {}
    begin(files, at=3.0)
    append_json_line(files.metrics, {"event": "eval", "step": 0, "loss": 5.0, "time": 3.5})
    assert set(read_measures(files)) == {"wall_s", "num_trainable"}  # the base's loss is not its
    write_steps(files, range(1, 6))
    measures = read_measures(files)
    assert measures["eval_loss"] == measures["best_eval_loss"] == 2.4
    assert measures["steps"] == 5
    assert measures["train_loss"] == pytest.approx(3.7)


def test_loss_that_is_not_finite_is_missing(tmp_path):
    files = RunFiles(tmp_path / "run")
    begin(files, at=0.0)
    for step, loss in ((1, 3.0), (2, math.nan), (3, math.inf)):
        append_json_line(files.metrics, {"event": "step", "step": step, "loss": loss, "time": 1.0})
        append_json_line(files.metrics, {"event": "eval", "step": step, "loss": loss, "time": 1.0})
    end(files, at=2.0, loss=math.nan)
    measures = read_measures(files)
    assert measures["train_loss"] == 3.0
    assert "eval_loss" not in measures
    assert "perplexity" not in measures


def test_tasks_are_of_the_trained_model_and_the_last_evaluation(undisturbed):
    undisturbed.evals.mkdir()
    for name, score, created in (("b", 0.25, "2026-01-01"), ("a", 0.75, "2026-01-02")):
        metrics = {"acc,none": score, "acc_stderr,none": 0.1, "alias": "arc", "f1,strict": 0.5}
        models = {
            "base": {"tasks": {"arc": {"acc,none": 0.1}}},
            "trained": {"tasks": {"arc": metrics}},
        }
        content = {"created": created, "models": models}
        (undisturbed.evals / f"{name}.json").write_text(json.dumps(content))
    measures = read_measures(undisturbed)
    found = {name: value for name, value in measures.items() if name.startswith("tasks.")}
    assert found == {"tasks.arc.acc": 0.75, "tasks.arc.f1,strict": 0.5}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("eval_loss", "lower"), ("tokens_per_s", "higher"), ("peak_memory_bytes", "lower"),
        ("tasks.arc.acc_norm", "higher"), ("tasks.wikitext.word_perplexity", "lower"),
        ("tasks.gsm8k.exact_match,strict-match", "higher"), ("wall_s", "lower"),
    ],
)  # fmt: skip
def test_what_is_better(name, direction):
    assert is_known(name)
    assert direction_of(name) == direction


def test_names_that_are_no_measure():
    assert not any(map(is_known, ("loss", "tasks", "tasks.arc", "Eval_loss", "")))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval_loss", 2.123456, "2.1235"), ("perplexity", 123456.7, "1.235e+05"),
        ("peak_memory_bytes", 3 * 2**30, "3.00 GiB"), ("train_s", 125.0, "2 min 05 s"),
        ("tokens_per_s", 822.727, "822.7"), ("steps", 1200, "1,200"),
        ("num_trainable", 4_884_480, "4.9 M"), ("tasks.arc.acc", 0.5, "0.5000"),
        ("eval_loss", None, ""),
    ],
)  # fmt: skip
def test_measures_for_people(name, value, text):
    assert format_measure(name, value) == text
