"""Results say what came of every trial, in an order that depends on the goal alone."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest
import yaml
from support.sweeps import losses, make_results, make_trial, write_sweep

from fsdpq.errors import UsageError
from fsdpq.recipe.load import load_recipe
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.results.leaderboard import build_columns, list_troubles, setting_text, short_titles
from fsdpq.sweep.results.results import (
    Goal,
    collect_trials,
    hash_recipe,
    parse_results,
    rank_trials,
    read_environment,
)
from fsdpq.sweep.results.written import render_best, render_csv, write_best, write_tables
from fsdpq.sweep.trial import Trial

RECIPE = """\
version: 1
name: x
model: {name_or_path: some/model}
quantization: {kind: none}
adapter: {kind: lora}
data: {path: rows.jsonl, format: text}
"""


def mixed():
    """A trial of every status."""
    return make_results(
        make_trial(0, status="skipped", reason="needs 26.1 GiB per rank, device has 24.0 GiB"),
        make_trial(1, status="failed", reason="CUDA out of memory", train_loss=3.0),
        make_trial(2, eval_loss=2.5, train_loss=2.25),
        make_trial(3, status="waiting"),
        make_trial(4, status="hopeless", reason="3.9 after step 3, median 2.4", eval_loss=3.9),
        make_trial(5, eval_loss=1.5, train_loss=2.0),
        make_trial(6, train_loss=1.0),
        make_trial(7, status="interrupted", eval_loss=1.0),
    )


def test_best_comes_first_and_what_did_not_finish_last():
    results = mixed()
    assert [(trial.id[-1], trial.rank) for trial in results.trials] == [
        ("5", 1), ("2", 2),
        ("6", None),  # finished, without the goal's measure
        ("4", None), ("7", None), ("3", None), ("1", None), ("0", None),
    ]  # fmt: skip
    assert results.best is results.trials[0]
    assert results.counts() == {
        "finished": 3, "hopeless": 1, "interrupted": 1, "waiting": 1, "failed": 1, "skipped": 1,
    }  # fmt: skip


def test_more_is_better_where_the_measure_says_so_or_the_goal():
    trials = [make_trial(i, tokens_per_s=float(i), eval_loss=float(i)) for i in range(3)]
    fastest = rank_trials(trials, Goal("tokens_per_s"))
    assert [trial.id[-1] for trial in fastest] == ["2", "1", "0"]
    worst = rank_trials(trials, Goal("eval_loss", "higher"))
    assert [trial.id[-1] for trial in worst] == ["2", "1", "0"]


def test_equal_trials_stay_in_the_order_of_the_sweep():
    trials = losses(2.0, 1.0, 2.0, 1.0)
    assert [trial.id[-1] for trial in rank_trials(trials, Goal())] == ["1", "3", "0", "2"]


def test_nothing_finished_has_no_best():
    assert make_results(make_trial(0, status="failed", eval_loss=1.0)).best is None
    assert make_results().best is None


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    path.with_name("rows.jsonl").write_text('{"text": "x"}\n')
    made = []
    for index in range(4):
        settings = {"adapter.rank": 8 * (index + 1)}
        recipe = load_recipe(path, [f"adapter.rank={8 * (index + 1)}"]).recipe
        made.append(Trial(f"{index:08x}", recipe, settings, source=path, base_dir=path.parent))
    return made


def test_collected_from_the_files_of_a_sweep(tmp_path, trials):
    written = make_results(
        make_trial(0, eval_loss=2.5), make_trial(1, eval_loss=1.5),
        make_trial(2, status="failed", reason="boom"), make_trial(3, status="skipped"),
    )  # fmt: skip
    files = write_sweep(tmp_path, written)
    found = collect_trials(files, trials, Goal())
    assert [trial.id[-1] for trial in found] == ["1", "0", "2", "3"]
    assert [trial.status for trial in found] == ["finished", "finished", "failed", "skipped"]
    assert found[0].measures["eval_loss"] == 1.5
    assert found[0].measures["steps"] == 12
    assert found[2].reason == "boom"
    assert found[3].measures == {}
    assert found[0].label == "adapter.rank=16"
    environment = read_environment([files.run(trial.id) for trial in found])
    assert environment == {"fsdpq": "0.9", "packages": {"torch": "2.13.0"}, "hardware": {}}


def test_hash_of_a_recipe_is_of_what_is_trained(trials):
    hashes = {hash_recipe(trial.recipe, smoke=False) for trial in trials}
    assert len(hashes) == 4
    named = trials[0].recipe.model_copy(update={"name": "another"})
    assert hash_recipe(named, smoke=False) == hash_recipe(trials[0].recipe, smoke=False)
    assert hash_recipe(trials[0].recipe, smoke=True) not in hashes


def test_json_holds_everything_and_is_read_back(tmp_path):
    results = mixed()
    files = SweepFiles(tmp_path)
    write_tables(files, results)
    content = json.loads(files.results_json.read_text())
    assert (content["format"], content["sweep"], content["best"]) == (1, "demo", "00000005")
    assert content["goal"] == {"measure": "eval_loss", "direction": "lower"}
    assert content["trials"][0]["measures"]["eval_loss"] == 1.5
    assert content["trials"][0]["measures"]["wall_s"] is None  # missing is null
    again = parse_results(content, source="results.json")
    assert again.as_json() == content
    assert again.best is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no results"), ({"format": 1}, "holds no results"),
        ({"format": 2, "trials": []}, "is in format 2; this fsdpq reads 1"),
        ({"format": "1", "trials": []}, "holds no results"),
    ],
)  # fmt: skip
def test_other_files_are_no_results(content, message):
    with pytest.raises(UsageError, match=message):
        parse_results(content, source="x.json")


def test_damaged_results_are_read_as_far_as_they_go():
    """A baseline is a file that people merge by hand."""
    row = {"id": 7, "measures": {"eval_loss": "low"}, "status": "great", "settings": None}
    trial = parse_results({"format": 1, "trials": [row, 3]}, source="x").trials[0]
    assert (trial.id, trial.status, dict(trial.measures)) == ("7", "waiting", {})


def test_csv_has_a_row_a_trial_and_empty_cells():
    rows = list(csv.DictReader(io.StringIO(render_csv(mixed()))))
    assert [row["id"][-1] for row in rows] == list("52647310")
    assert rows[0]["rank"] == "1"
    assert rows[0]["adapter.rank"] == "48"
    assert rows[0]["eval_loss"] == "1.5"
    assert rows[0]["wall_s"] == ""
    assert rows[6]["reason"] == "CUDA out of memory"


def test_files_do_not_depend_on_the_order_in_which_trials_ended():
    trials = [make_trial(i, eval_loss=float(i)) for i in range(6)]
    texts = set()
    for seed in range(3):
        measures = list(trials)
        random.Random(seed).shuffle(measures)
        ordered = sorted(measures, key=lambda trial: trial.id)  # as trials.json has them
        texts.add(render_csv(make_results(*ordered)))
    assert len(texts) == 1


def test_best_recipe_says_how_to_train_it(tmp_path):
    results = make_results(*losses(2.5, 1.5), make_trial(2, status="failed"))
    files = write_sweep(tmp_path, results)
    write_best(files, results)
    text = files.best_recipe.read_text()
    assert yaml.safe_load(text) == {"version": 1, "name": "trial 00000001"}
    assert text.startswith("# The best of 2 trials of the sweep demo: eval_loss 1.5000.\n")
    assert "\n# fsdpq train recipe.yaml adapter.rank=16\n" in text
    assert "\n# fsdpq train best.yaml --base-dir /recipes\n" in text
    write_best(files, make_results(make_trial(2, status="failed")))
    assert not files.best_recipe.exists()  # a best recipe of another day is gone


def test_names_cannot_leave_the_comment_of_the_best_recipe(tmp_path):
    trial = make_trial(0, settings={"name": "a\nmodel: evil"}, eval_loss=1.0)
    results = make_results(trial, name="x\nmodel: evil")
    text = render_best(write_sweep(tmp_path, results), results) or ""
    assert yaml.safe_load(text) == {"version": 1, "name": "trial 00000000"}


def test_columns_are_those_that_differ():
    settings = [{"adapter.rank": 8, "optimizer.lr": lr, "seed": 1} for lr in (1e-4, 2e-4)]
    trials = [
        make_trial(i, settings=entry, eval_loss=1.0 + i, train_loss=2.0, tokens_per_s=9.0 + i)
        for i, entry in enumerate(settings)
    ]
    columns = {column.key: column for column in build_columns(make_results(*trials))}
    assert list(columns) == ["rank", "trial", "optimizer.lr", "eval_loss", "tokens_per_s"]
    assert columns["optimizer.lr"].title == "lr"
    assert columns["optimizer.lr"].cells == ("1e-4", "2e-4")
    assert columns["eval_loss"].cells == ("1.0000", "2.0000")


def test_status_is_told_where_a_trial_did_not_finish():
    columns = {column.key: column for column in build_columns(mixed())}
    assert columns["status"].cells[-2:] == ("failed", "skipped")
    assert "status" not in {column.key for column in build_columns(make_results(*losses(1, 2)))}


def test_titles_are_as_short_as_they_can_be_told_apart():
    keys = ["adapter.rank", "data.eval.path", "data.path", "quantization"]
    assert short_titles(keys) == {
        "adapter.rank": "rank", "data.eval.path": "eval.path", "data.path": "data.path",
        "quantization": "quantization",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "1e-4"), (0.00025, "2.5e-4"), (0.1, "0.1"), (1 / 3, "0.3333"),
        (1e6, "1e6"), (2e-300, "2e-300"), (True, "true"), (None, ""), ("a\x1b[2J", "a�[2J"),
        ([1, "b"], '[1, "b"]'), (0.0, "0"), (-5e-5, "-5e-5"),
    ],
)  # fmt: skip
def test_settings_for_people(value, text):
    assert setting_text(value) == text


def test_troubles_with_one_reason_are_told_together():
    reason = "needs 26.1 GiB per rank, device has 24.0 GiB"
    results = make_results(
        *(make_trial(i, status="skipped", reason=reason) for i in range(3)),
        make_trial(3, status="failed", reason="boom"), make_trial(4, train_loss=1.0),
        make_trial(5, status="waiting"),
    )  # fmt: skip
    found = [(t.status, t.reason, len(t.trials)) for t in list_troubles(results)]
    assert found == [
        ("finished", "it has no eval_loss", 1), ("failed", "boom", 1), ("skipped", reason, 3),
    ]  # fmt: skip
