"""``--ci`` and what goes with it: asked before anything runs, and told in every form."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner
from support.sweeps import losses, make_results, make_trial, write_run

from fsdpq.cli.main import main
from fsdpq.cli.sweeps.conclusion import conclude, render_verdict
from fsdpq.cli.sweeps.verdict import ci_options
from fsdpq.errors import ExitCode, FsdpqError, UsageError
from fsdpq.recipe.load import load_recipe
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.spec import dump_spec, recipe_spec
from fsdpq.sweep.frozen import freeze
from fsdpq.sweep.outcome import Outcome, write_outcome
from fsdpq.sweep.results.results import TrialResult
from fsdpq.sweep.results.verdict import judge

GOLDEN = """\
failed  eval_loss>2.1
  00000001 (adapter.rank=16) has eval_loss 2.2000
passed  best.eval_loss>2.1
failed  baseline old.json
          trial                       measure    then    now     change
  worse   00000001 (adapter.rank=16)  eval_loss  2.0000  2.2000  +10.00 %
  better  00000000 (adapter.rank=8)   eval_loss  2.0000  1.5000  -25.00 %
  3 values compared, 1 the same within the tolerance
  not in this sweep: 00000009 (adapter.rank=80)
  new: 00000003 (adapter.rank=32)
note: torch was 2.13.0, is 2.14.0"""


def request(*arguments: str):
    """Returns what `ci_options` make of a command line."""

    @click.command()
    @ci_options
    def verb(ci):
        caught.append(ci)

    caught = []
    result = CliRunner().invoke(verb, arguments)
    if isinstance(result.exception, FsdpqError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return caught[0]


@pytest.fixture
def baseline(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    then = make_results(
        *losses(2.0, 2.0, 2.0), make_trial(9, eval_loss=2.0),
        environment={"packages": {"torch": "2.13.0"}},
    )  # fmt: skip
    Path("old.json").write_text(json.dumps(then.as_json()))
    return "old.json"


@pytest.fixture
def results():
    environment = {"packages": {"torch": "2.14.0"}}
    return make_results(*losses(1.5, 2.2, 2.01, 2.0), environment=environment)


ASKED = ("--fail-if", "eval_loss>2.1", "--fail-if", "best.eval_loss>2.1", "--baseline", "old.json")


def test_verdict_in_words(results, baseline):
    verdict = judge(results, request(*ASKED).wanted)
    assert click.unstyle("\n".join(render_verdict(verdict))) == GOLDEN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-if", "loss>2"], "`loss` is no measure"),
        (["--fail-if", "eval_loss"], "is no condition"),
        (["--baseline", "missing.json"], "cannot be read"),
        (["--baseline", "old.json", "--tolerance", "much"], "is no tolerance"),
    ],
)
def test_mistakes_end_the_command_before_anything_runs(arguments, message, baseline):
    with pytest.raises(UsageError, match=message):
        request(*arguments)


def test_tolerance_needs_a_baseline():
    with pytest.raises(AssertionError, match="--tolerance says how far from --baseline"):
        request("--tolerance", "0.1")


def test_nothing_asked_is_nothing_said(tmp_path, results, capsys):
    verdict = conclude(SweepFiles(tmp_path), results, request())
    assert verdict.exit_code == ExitCode.OK
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_ci_leaves_files_where_ci_looks(tmp_path, results, baseline, capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    files = SweepFiles(tmp_path / "sweep")
    verdict = conclude(files, results, request("--ci", *ASKED))
    assert verdict.exit_code == ExitCode.RUN_FAILED
    root = ElementTree.fromstring(files.junit.read_bytes())
    assert (root.get("tests"), root.get("failures")) == ("7", "2")
    assert files.summary.read_text().startswith("## Sweep demo: failed\n")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "::error" not in err


def test_files_go_where_the_user_says(tmp_path, results):
    junit, summary = tmp_path / "a" / "j.xml", tmp_path / "b" / "s.md"
    conclude(SweepFiles(tmp_path / "sweep"), results,
             request("--junit", str(junit), "--summary", str(summary)))  # fmt: skip
    assert junit.is_file()
    assert summary.is_file()
    assert not (tmp_path / "sweep").exists()


def test_github_gets_annotations_and_a_job_summary(tmp_path, baseline, capsys, monkeypatch):
    page = tmp_path / "step-summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    failed = make_trial(7, status="failed", reason="100 % full\n::warning::x")
    conclude(SweepFiles(tmp_path), make_results(*losses(2.5), failed), request("--ci", *ASKED[:2]))
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    assert found == [
        "::error title=trial 00000007 (adapter.rank=64) failed::100 %25 full%0A::warning::x",
        "::error title=eval_loss>2.1 failed::00000000 (adapter.rank=8) has eval_loss 2.5000",
    ]
    assert page.read_text().startswith("before\n## Sweep demo: failed\n")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> SweepFiles:
    """A sweep of two smoke runs that has nothing left to run."""
    root = tmp_path_factory.mktemp("sweep")
    recipe = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    loaded = recipe_spec(recipe, ["adapter.rank=8,16"], {"smoke": True})
    files = SweepFiles(root / "ranks")
    frozen = freeze(files, expand(loaded).trials)
    files.spec.write_text(dump_spec(loaded, files.root))
    for trial, loss in zip(frozen, (2.0, 2.5), strict=True):
        write_outcome(files, Outcome(trial.id, "finished"))
        write_run(files, TrialResult(trial.id, status="finished", measures={"eval_loss": loss}))
    return files


def run_sweep(files: SweepFiles, *arguments: str) -> int:
    try:
        main(["sweep", str(files.root), *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_sweep_is_judged_again_without_running_anything(sweep, tmp_path, capsys):
    assert run_sweep(sweep) == ExitCode.OK
    kept = tmp_path / "kept.json"
    kept.write_bytes(sweep.results_json.read_bytes())
    assert run_sweep(sweep, "--ci", "--baseline", str(kept), "--tolerance", "0") == ExitCode.OK
    capsys.readouterr()
    assert run_sweep(sweep, "--ci", "--fail-if", "eval_loss>2.4") == ExitCode.RUN_FAILED
    out, err = capsys.readouterr()
    assert out == f"{sweep.root}\n"
    assert "failed  eval_loss>2.4" in err
    assert run_sweep(sweep, "--fail-if", "best.eval_loss>2.4") == ExitCode.OK
    assert run_sweep(sweep, "--fail-if", "evalloss>2.4") == ExitCode.RECIPE


def test_regression_against_the_baseline_ends_with_one(sweep, tmp_path, capsys):
    assert run_sweep(sweep) == ExitCode.OK
    content = json.loads(sweep.results_json.read_text())
    assert [row["measures"]["eval_loss"] for row in content["trials"]] == [2.0, 2.5]
    content["trials"][1]["measures"]["eval_loss"] = 2.4
    old = tmp_path / "old.json"
    old.write_text(json.dumps(content))
    capsys.readouterr()
    assert run_sweep(sweep, "--ci", "--baseline", str(old)) == ExitCode.RUN_FAILED
    assert "eval_loss  2.4000  2.5000  +4.17 %" in capsys.readouterr().err
    assert "baseline" in sweep.junit.read_text()
    assert run_sweep(sweep, "--baseline", str(old), "--tolerance", "eval_loss=0.05") == 0


def test_baseline_may_be_the_file_that_is_written_anew(sweep):
    """It is read first: a regression cannot hide by overwriting what it is compared with."""
    assert run_sweep(sweep) == ExitCode.OK
    content = json.loads(sweep.results_json.read_text())
    content["trials"][0]["measures"]["eval_loss"] = 1.0
    sweep.results_json.write_text(json.dumps(content))
    same = ("--baseline", str(sweep.results_json))
    assert run_sweep(sweep, *same) == ExitCode.RUN_FAILED
    assert run_sweep(sweep, *same) == ExitCode.OK


def test_directory_that_cannot_be_written_is_no_bug(sweep, tmp_path, capsys):
    assert run_sweep(sweep) == ExitCode.OK
    sweep.page.unlink()
    sweep.page.mkdir()  # root may write everywhere, but not over a directory
    try:
        assert run_sweep(sweep) == ExitCode.ENVIRONMENT
    finally:
        sweep.page.rmdir()
    assert "cannot be written: Is a directory" in capsys.readouterr().err
    assert run_sweep(sweep, "--junit", str(tmp_path)) == ExitCode.RECIPE


def test_json_answer_holds_the_results(sweep, capsys):
    assert run_sweep(sweep, "--json", "--fail-if", "eval_loss>2.4") == ExitCode.RUN_FAILED
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 1
    assert [row["rank"] for row in answer["trials"]] == [1, 2]


def test_best_recipe_is_one_that_fsdpq_reads(sweep, capsys):
    assert run_sweep(sweep) == ExitCode.OK
    best = load_recipe(sweep.best_recipe).recipe
    assert best.adapter.rank == 8
    command = next(
        line for line in sweep.best_recipe.read_text().splitlines() if "quickstart.yaml" in line
    )
    words = shlex.split(command.removeprefix("# fsdpq train "))
    assert load_recipe(Path(words[0]), words[1:]).recipe == best


def test_options_need_no_imports_of_sweeps():
    """They decorate a verb, which every start of ``fsdpq`` imports."""
    code = (
        "import sys, fsdpq.cli.sweeps.verdict; "
        "print([m for m in sys.modules if m.startswith(('fsdpq.sweep', 'pydantic', 'yaml'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
