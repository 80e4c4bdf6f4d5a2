"""Several runs on one page: what differs is found, whatever the runs hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.run_dirs import HOSTILE, Tags, write_run
from support.sweeps import make_trial
from support.sweeps import write_run as write_sweep_run
from support.tiny import tiny_recipe

from fsdpq.cli.main import main
from fsdpq.launch.runs.compared import compare_environments, read_runs
from fsdpq.reports.comparison import comparison_content
from fsdpq.reports.comparison_page import count_tokens, render_comparison
from fsdpq.reports.report import write_report
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import append_json_line
from fsdpq.sweep.frozen import freeze
from fsdpq.sweep.outcome import Outcome, write_outcome
from fsdpq.sweep.trial import Trial, trial_id


def compare(*paths: Path) -> tuple[dict, str]:
    runs = read_runs(paths)
    content = comparison_content(runs, compare_environments(runs))
    page = render_comparison(content, runs, links=[""] * len(runs))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    return content, page


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    lora = {"adapter": {"kind": "lora", "rank": 8}, "training": {"seed": 1}}
    dora = {"adapter": {"kind": "dora", "rank": 8, "extra": None}, "training": {"seed": 1}}
    place = {"provenance": {"adapter.kind": "b.yaml:2:9"}, "packages": {"torch": "2.14.0"}}
    write_run(tmp_path / "a", settings=lora)
    write_run(tmp_path / "b", settings=dora, lock=place, loss=2.0)
    return [tmp_path / "a", tmp_path / "b"]


def test_only_what_differs_is_told_with_its_place(two: list[Path]) -> None:
    content, page = compare(*two)
    assert [row["key"] for row in content["settings"]] == ["adapter.kind", "adapter.extra"]
    kind, extra = (row["sides"] for row in content["settings"])
    assert [side["value"] for side in kind] == ["lora", "dora"]
    assert [side["source"] for side in kind] == ["", "b.yaml:2:9"]
    assert [side["present"] for side in extra] == [False, True], "null is not the same as missing"
    assert content["num_same_settings"] == 5
    assert content["environment"] == [
        {"what": "torch", "level": "numbers", "values": ["2.13.0", "2.14.0"]}
    ]
    text = re.sub(r"\s+", " ", Tags(page).text)
    assert "adapter.extrano such key" in text
    assert "b.yaml:2:9" in text


def test_the_best_of_a_column_is_marked_where_there_is_one(two: list[Path]) -> None:
    files = RunFiles(two[1])
    append_json_line(files.events, {"event": "done", "steps": 4, "eval_loss_after": 1.25})
    content, page = compare(*two)
    assert content["best"] == {"eval_loss_after": 1}, "all else is equal, or is not there"
    assert re.findall(r'class="best">([^<]*)<', page) == ["1.250"]


def test_curves_lie_over_each_other_on_the_same_axes(two: list[Path]) -> None:
    _, page = compare(*two)
    assert page.count('aria-label="Training loss by step"') == 1
    assert "a, step 1: 3.25" in page
    assert "b, step 1: 2" in page
    assert 'class="c-0 d-0 normal"' in page
    assert 'class="c-1 d-0 normal"' in page
    assert "by trained tokens" not in page, "a step has as many in both"


def test_runs_whose_steps_have_more_tokens_are_compared_by_tokens_too(tmp_path: Path) -> None:
    for name, tokens in (("small", 10), ("large", 40)):
        files = RunFiles(tmp_path / name)
        files.root.mkdir()
        for step in (1, 2):
            row = {"event": "step", "step": step, "time": 1.0, "trained_tokens": tokens}
            append_json_line(files.metrics, row)
            append_json_line(files.metrics, row | {"event": "eval", "loss": 2.0 / step})
    _, page = compare(tmp_path / "small", tmp_path / "large")
    assert "large, trained tokens 80: 1" in page
    assert "small, trained tokens 20: 1" in page
    assert count_tokens(read_runs([tmp_path / "large"])[0].record) == {0: 0, 1: 40, 2: 80}


def test_answers_stand_beside_each_other_and_the_same_one_before_once(two: list[Path]) -> None:
    content, page = compare(*two)
    assert content["samples"] == [
        {"prompt": "plain", "before": ["before plain"] * 2, "after": ["after plain"] * 2}
    ]
    assert page.count(">before plain<") == 1
    assert page.count(">after plain<") == 2


def test_any_directory_with_a_trace_of_a_run_can_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    empty = RunFiles(tmp_path / "empty")
    empty.root.mkdir()
    empty.metrics.write_text('{"event": "eval", "step": 0, "loss": NaN, "time": 1.0}\n{"event"')
    content, page = compare(tmp_path / "whole", tmp_path / "empty")
    assert [run["status"] for run in content["runs"]] == ["finished", "unfinished"]
    assert [run["state"] for run in content["runs"]] == [None, "starting"]
    assert "events.jsonl is not there" in page
    assert "nan" not in page


def test_hostile_text_is_escaped_on_this_page_too(tmp_path: Path) -> None:
    settings = {"metrics": {HOSTILE: HOSTILE}}
    lock = {"provenance": {f"metrics.{HOSTILE}": HOSTILE}, "fsdpq": HOSTILE}
    for name, more in (("plain", {"metrics": {"x": 1}}), (HOSTILE.replace("/", "-"), settings)):
        write_run(tmp_path / name, text=HOSTILE, settings=more, lock=lock)
    content, page = compare(*sorted(tmp_path.iterdir()))
    tags = {tag for tag, _ in Tags(page).found}
    assert not tags & {"script", "img", "iframe", "link"}
    assert HOSTILE in Tags(page).text
    assert len(content["settings"]) == 2


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run")
    content, _ = compare(tmp_path / "a" / "run", tmp_path / "b" / "run")
    labels = [run["label"] for run in content["runs"]]
    assert labels == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def run(*arguments: object) -> None:
    main(["report", *map(str, arguments)])


def test_the_command_writes_beside_the_runs_and_links_their_reports(
    two: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0].parent)
    write_report(RunFiles(Path("a")))
    run("a", "b")
    assert capsys.readouterr().out == f"{two[0].parent / 'comparison.html'}\n"
    assert re.findall('href="([^"]*)"', Path("comparison.html").read_text()) == ["a/report.html"]
    run("a", "b", "--json", "--out", "page.html")
    assert json.loads(capsys.readouterr().out)["runs"][1]["label"] == "b"
    assert Path("page.html").is_file()


def test_one_run_gets_its_report_again(
    two: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0])
    run(".")
    assert capsys.readouterr().out == "report.html\n"
    assert json.loads(Path("report.json").read_text())["run"] == "a"
    Path("report.json").unlink()
    run(".", "--json")
    headline = json.loads(capsys.readouterr().out)["headline"]
    assert headline["train_loss"] == pytest.approx(3.25 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert not Path("report.json").exists()


@pytest.mark.parametrize("arguments", [["here"], ["here", "."]])
def test_what_is_no_run_and_what_cannot_be_written_are_named(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert "`here` is no run directory" in capsys.readouterr().err
    write_run(tmp_path / "here")
    with pytest.raises(SystemExit) as ended:
        run("here", "--out", "not/there.html")
    assert ended.value.code == 4
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_sweep_gets_its_results_and_page_again_and_is_named_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = [tiny_recipe(adapter={"rank": rank}) for rank in (2, 4)]
    trials = [
        Trial(trial_id(recipe, base_dir=tmp_path), recipe, {"adapter.rank": recipe.adapter.rank})
        for recipe in recipes
    ]
    files = SweepFiles(Path("sweep"))
    freeze(files, trials)
    files.spec.write_text("sweep: 1\nname: ranks\n")
    for trial, loss in zip(trials, (1.5, 1.25), strict=True):
        write_sweep_run(files, replace(make_trial(0, eval_loss=loss), id=trial.id))
        write_outcome(files, Outcome(trial.id, "finished"))
    run("sweep")
    assert capsys.readouterr().out == "sweep/report.html\n"
    assert "ranks" in files.page.read_text()
    files.page.unlink()
    run("sweep", "--json")
    content = json.loads(capsys.readouterr().out)
    assert [trial["id"] for trial in content["trials"]] == [trials[1].id, trials[0].id]
    assert not files.page.exists()
    with pytest.raises(SystemExit) as ended:
        run("sweep", files.run(trials[0].id).root)
    assert ended.value.code == 2
    assert "`sweep` is a sweep" in capsys.readouterr().err
