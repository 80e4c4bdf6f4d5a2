"""A sweep in CI fails for what was asked of it, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.sweeps import losses, make_results, make_trial

from fsdpq.errors import ExitCode, UsageError
from fsdpq.sweep.results.baseline import (
    Tolerances,
    compare_with_baseline,
    parse_tolerances,
    read_baseline,
)
from fsdpq.sweep.results.conditions import Condition, parse_condition
from fsdpq.sweep.results.results import Goal, parse_results
from fsdpq.sweep.results.verdict import Wanted, judge


def broken(text, results):
    return list(parse_condition(text).broken_by(results))


def compare(now, then, **tolerances):
    allowed = Tolerances(tolerances.pop("usual", 0.01), tolerances)
    return compare_with_baseline(now, then, allowed, source="old.json")


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("eval_loss>2.1", Condition("eval_loss>2.1", "eval_loss", ">", 2.1)),
        (" best.eval_loss >= 2 ", Condition("best.eval_loss >= 2", "eval_loss", ">=", 2, True)),
        ("peak_memory_bytes>20GiB", Condition("peak_memory_bytes>20GiB", "peak_memory_bytes", ">",
                                              20 * 2**30)),
        ("tokens_per_s<1e3", Condition("tokens_per_s<1e3", "tokens_per_s", "<", 1000)),
        ("tasks.arc.acc<.5", Condition("tasks.arc.acc<.5", "tasks.arc.acc", "<", 0.5)),
        ("steps!=-3", Condition("steps!=-3", "steps", "!=", -3)),
        ("tasks.gsm8k.exact_match,strict-match == 0",
         Condition("tasks.gsm8k.exact_match,strict-match == 0",
                   "tasks.gsm8k.exact_match,strict-match", "==", 0)),
    ],
)  # fmt: skip
def test_conditions(text, condition):
    assert parse_condition(text) == condition


@pytest.mark.parametrize(
    "text",
    ["", "eval_loss", "eval_loss>", ">2", "eval_loss>2 or 1", "eval_loss=2", "eval_loss>two",
     "eval_loss>__import__('os')", "2.1<eval_loss", "eval_loss>1<2", "eval_loss>2 GB",
     "eval_loss>1e999", "eval_loss>nan"],
)  # fmt: skip
def test_what_is_no_condition(text):
    with pytest.raises(UsageError):
        parse_condition(text)


@pytest.mark.parametrize("name", ["accuracy", "best.x", "tasks.arc", "a.b"])
def test_unknown_measure_lists_those_that_there_are(name):
    with pytest.raises(UsageError, match="is no measure") as caught:
        parse_condition(f"{name}>1")
    assert "`eval_loss`" in caught.value.hint


def test_misspelt_measure_is_guessed():
    with pytest.raises(UsageError) as caught:
        parse_condition("evalloss>1")
    assert caught.value.hint == "did you mean `eval_loss`?"


def test_condition_is_asked_of_every_finished_trial():
    results = make_results(*losses(2.0, 2.2, 2.4), make_trial(3, status="failed", eval_loss=9.0))
    assert broken("eval_loss>2.4", results) == []
    assert broken("eval_loss>=2.2", results) == [
        "00000001 (adapter.rank=16) has eval_loss 2.2000",
        "00000002 (adapter.rank=24) has eval_loss 2.4000",
    ]
    assert broken("best.eval_loss>2.1", results) == []
    assert broken("best.eval_loss>1.9", results) == [
        "00000000 (adapter.rank=8) has eval_loss 2.0000"
    ]


@pytest.mark.parametrize(
    ("operator", "fails"),
    [("<", (1,)), ("<=", (1, 2)), (">", (3,)), (">=", (2, 3)), ("==", (2,)), ("!=", (1, 3))],
)
def test_every_comparison(operator, fails):
    results = make_results(*losses(1.0, 2.0, 3.0))
    lines = broken(f"eval_loss{operator}2", results)
    assert [line.endswith(f"{value}.0000") for value, line in zip(fails, lines, strict=True)]


def test_trial_without_the_measure_breaks_the_condition():
    results = make_results(*losses(2.0), make_trial(1, train_loss=1.0))
    assert broken("eval_loss>3", results) == ["00000001 (adapter.rank=16) has no eval_loss"]


def test_sweep_that_shows_nothing_breaks_every_condition():
    failed = make_results(make_trial(0, status="failed", eval_loss=1.0))
    assert broken("eval_loss>3", failed) == ["no trial finished"]
    assert broken("best.eval_loss>3", failed) == ["there is no best trial"]


def test_regression_beyond_the_tolerance_fails():
    then = make_results(*losses(2.0, 2.0, 2.0, 2.0))
    now = make_results(*losses(2.019, 2.021, 1.979, 2.0))
    comparison = compare(now, then)
    found = {row.trial.id[-1]: row.change for row in comparison.rows}
    assert found == {"0": "same", "1": "worse", "2": "better", "3": "same"}
    assert not comparison.passed
    assert compare(now, then, usual=0.02).passed
    assert compare(now, then, eval_loss=0.0105).passed
    row = comparison.changed("worse")[0]
    assert row.texts == ("2.0000", "2.0210", "+1.05 %")


def test_exactly_the_tolerance_passes():
    """100.0 * 1.1 is 110.00000000000001: rounding is no regression."""
    then, now = make_results(*losses(100.0)), make_results(*losses(110.00000000000001))
    assert compare(now, then, usual=0.1).passed
    assert not compare(now, then, usual=0.0999).passed


def test_losses_below_zero_have_tolerances_too():
    """A custom task's metric may be negative: a share is of its size."""
    name = "tasks.x.reward"
    then, now = (make_results(make_trial(0, **{name: value}), goal=name) for value in (-2.0, -2.1))
    assert compare(now, then).changed("worse")
    assert compare(now, then, usual=0.06).passed


def test_more_is_better_for_scores_and_by_the_goal():
    name = "tasks.arc.acc"
    then, now = (make_results(make_trial(0, **{name: v, "eval_loss": 1.0})) for v in (0.5, 0.4))
    assert [row.measure for row in compare(now, then).changed("worse")] == [name]
    assert compare(then, now).passed
    high, low = (
        replace(make_results(*losses(v)), goal=Goal("eval_loss", "higher")) for v in (2, 1)
    )
    assert compare(low, high).changed("worse")


def test_timings_are_compared_only_when_asked():
    fast, slow = (
        make_results(make_trial(0, eval_loss=1.0, tokens_per_s=v)) for v in (900.0, 500.0)
    )
    assert [row.measure for row in compare(slow, fast).rows] == ["eval_loss"]
    asked = compare(slow, fast, tokens_per_s=0.3)
    assert [row.measure for row in asked.changed("worse")] == ["tokens_per_s"]
    assert compare(slow, fast, tokens_per_s=0.5).passed
    assert compare(fast, slow, tokens_per_s=0.3).passed


def test_goal_that_is_a_timing_needs_its_own_tolerance():
    then, now = (
        make_results(make_trial(0, tokens_per_s=v), goal="tokens_per_s") for v in (9.0, 5.0)
    )
    comparison = compare(now, then)
    assert not comparison.passed  # nothing was compared: that is no pass
    assert "name one, as `--tolerance tokens_per_s=0.1`" in comparison.broken[0]
    assert compare(now, then, tokens_per_s=0.5).passed


def test_amounts_may_not_change_in_either_direction():
    then, more, less = (make_results(make_trial(0, eval_loss=1.0, steps=n)) for n in (10, 12, 8))
    assert compare(more, then).passed
    assert compare(more, then, steps=0).changed("worse")
    assert compare(less, then, steps=0).changed("worse")


def test_zero_in_the_baseline():
    then, now = make_results(*losses(0.0)), make_results(*losses(0.5))
    assert compare(now, then).changed("worse")[0].texts == ("0.0000", "0.5000", "")
    assert compare(then, then).passed


def test_measure_that_is_gone_is_worse():
    then = make_results(make_trial(0, eval_loss=1.0, **{"tasks.arc.acc": 0.5}))
    row = compare(make_results(*losses(1.0)), then).changed("worse")[0]
    assert (row.measure, row.new, row.texts[1]) == ("tasks.arc.acc", None, "none")


@pytest.mark.parametrize("status", ["failed", "hopeless", "skipped", "interrupted"])
def test_trial_that_no_longer_finishes_is_broken(status):
    then, now = make_results(*losses(1.0)), make_results(make_trial(0, status=status))
    comparison = compare(now, then)
    assert comparison.broken == (f"00000000 (adapter.rank=8) finished then and is {status} now",)


def test_missing_and_new_trials_are_told():
    comparison = compare(make_results(*losses(1.0, 1.0)[1:], make_trial(2, eval_loss=1.0)),
                         make_results(*losses(1.0, 1.0)))  # fmt: skip
    assert [trial.id[-1] for trial in comparison.missing] == ["0"]
    assert [trial.id[-1] for trial in comparison.new] == ["2"]
    assert comparison.passed


def test_nothing_in_common_is_no_pass():
    now = make_results(make_trial(7, eval_loss=1.0))
    assert "none of these trials" in compare(now, make_results(*losses(1.0))).broken[0]
    unfinished = make_results(make_trial(0, status="failed"))
    assert compare(make_results(*losses(1.0)), unfinished).broken == ("no trial of it finished",)


def renamed(trial, new_id, **fields):
    return replace(trial, id=new_id, **fields)


def test_same_recipe_in_another_directory_is_the_same_trial():
    old = [replace(trial, recipe_sha256=f"hash{trial.id}") for trial in losses(1.0, 2.0)]
    moved = [renamed(trial, f"new{trial.id}", settings={}) for trial in old]
    comparison = compare(make_results(*moved), make_results(*old))
    assert [(row.old, row.new) for row in comparison.rows] == [(1.0, 1.0), (2.0, 2.0)]
    assert comparison.num_by_settings == 0


def test_other_ids_are_matched_by_settings_and_that_is_said():
    old = losses(1.0, 2.0)
    now = make_results(*(renamed(trial, f"new{trial.id}") for trial in old))
    comparison = compare(now, make_results(*old))
    assert [(row.old, row.new) for row in comparison.rows] == [(1.0, 1.0), (2.0, 2.0)]
    assert comparison.num_by_settings == 2
    assert comparison.notices[0].startswith("2 trials compared by settings")


def test_settings_that_name_two_trials_match_none():
    old = losses(1.0)
    twins = [renamed(old[0], "a"), renamed(old[0], "b")]
    comparison = compare(make_results(*twins), make_results(*old))
    assert comparison.rows == ()
    assert len(comparison.new) == 2


def test_id_goes_before_settings():
    old = losses(1.0, 5.0)
    swapped = [replace(old[0], settings=old[1].settings), replace(old[1], settings=old[0].settings)]
    rows = compare(make_results(*swapped), make_results(*old)).rows
    assert {row.change for row in rows} == {"same"}


def test_smoke_runs_are_not_compared_with_real_ones():
    results = make_results(*losses(1.0))
    comparison = compare(replace(results, smoke=True), results)
    assert comparison.broken == ("it holds real runs, and these are smoke runs",)


def test_other_versions_are_told():
    now, then = (
        make_results(*losses(1.0), environment={"packages": {"torch": version, "pyyaml": version}})
        for version in ("2.14.0", "2.13.0")
    )
    assert compare(now, then).notices == ("torch was 2.13.0, is 2.14.0",)


@pytest.mark.parametrize("texts", [["x"], ["-0.1"], ["eval_loss="], ["nan"], ["inf"], ["=1"]])
def test_what_is_no_tolerance(texts):
    with pytest.raises(UsageError):
        parse_tolerances(texts)


def test_tolerances_for_all_and_for_one():
    tolerances = parse_tolerances(["0.05", "tokens_per_s=0.3", "tasks.arc.acc=0"])
    assert tolerances.of("eval_loss") == 0.05
    assert tolerances.of("tokens_per_s") == 0.3
    assert tolerances.of("tasks.arc.acc") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no"),
    ],
)
def test_baseline_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_baseline(path)


def test_verdict_of_everything_that_was_asked(tmp_path):
    then = make_results(*losses(2.0, 2.0))
    path = tmp_path / "old.json"
    path.write_text(json.dumps(then.as_json()))
    wanted = Wanted(
        (parse_condition("eval_loss>2.05"), parse_condition("steps<1")),
        read_baseline(path), "old.json", Tolerances(),
    )  # fmt: skip
    now = make_results(*(make_trial(i, eval_loss=2.0 + i / 10, steps=5) for i in range(2)))
    verdict = judge(now, wanted)
    assert [(check.name, check.passed) for check in verdict.checks] == [
        ("eval_loss>2.05", False), ("steps<1", True), ("baseline old.json", False),
    ]  # fmt: skip
    assert verdict.checks[2].broken == (
        "00000001 (adapter.rank=16): eval_loss was 2.0000, is 2.1000 (+5.00 %, 1 % allowed)",
    )
    assert verdict.exit_code == ExitCode.RUN_FAILED
    assert judge(now, Wanted()).exit_code == ExitCode.OK
    assert judge(then, replace(wanted, conditions=())).passed


def test_results_are_no_worse_than_themselves():
    trial = make_trial(0, eval_loss=1.2345678901234567, **{"tasks.arc.acc": 0.1 + 0.2})
    now = make_results(trial)
    then = parse_results(json.loads(json.dumps(now.as_json())), source="x")
    assert {row.change for row in compare(now, then, usual=0).rows} == {"same"}
