"""`fsdpq eval` on a run and on a recipe: the numbers, the record, the report, what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run
from support.harness_tasks import save_harness_tasks

from fsdpq.cli.screen import PlainScreen
from fsdpq.errors import RecipeError, UsageError
from fsdpq.launch.evaluate import evaluate
from fsdpq.launch.question import Question
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

SHORT = (
    "training.steps=6", "checkpoint.interval=3", "training.eval_interval=3",
    "metrics.sample_prompts=[]", "~metrics.sample_max_new_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(project: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A finished run with checkpoints of the steps 3 and 6."""
    files = RunFiles(tmp_path_factory.mktemp("eval") / "run")
    cache = tmp_path_factory.getbasetemp() / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "fsdpq", "train", "recipe.yaml", *SHORT,
         "--run-dir", str(files.root)],
        cwd=project, env=os.environ | {"FSDPQ_CACHE": str(cache), "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return files


def losses(record: dict[str, Any]) -> dict[str, float]:
    return {name: result["loss"] for name, result in record["models"].items()}


def test_a_run_is_measured_as_it_measured_itself(fsdpq: Run, finished: RunFiles) -> None:
    own = [row for row in read_json_lines(finished.metrics) if row["event"] == "eval"]
    assert [row["step"] for row in own] == [0, 3, 6]

    found = fsdpq("eval", str(finished.root), "--base")
    assert found.returncode == 0, found.stderr
    record = json.loads((finished.evals / "held-out.json").read_text())
    # The same ranks, rows and micro-batches: the same sums, to the last bit.
    assert losses(record) == {"base": own[0]["loss"], "trained": own[2]["loss"]}
    trained = record["models"]["trained"]
    assert trained["perplexity"] == own[2]["perplexity"]
    assert f"{own[2]['loss'] - own[0]['loss']:+.4f}" in found.stdout
    assert f"8 rows, {trained['num_tokens']} tokens with loss" in found.stdout
    assert record["data_digest"]
    assert "Evaluations" in finished.report_html.read_text()
    assert json.loads(finished.report_json.read_text())["evaluations"][0]["name"] == "held-out"


def test_a_checkpoint_is_measured_by_tasks_and_another_text(
    fsdpq: Run, finished: RunFiles, project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is missing: pip install lm_eval")
    tasks = save_harness_tasks(tmp_path / "tasks", num_questions=5)
    (project / "book.txt").write_text("one two three four\n\nfive is five and six is six\n" * 9)
    found = fsdpq(
        "eval", str(finished.root), "--checkpoint", "3", "--data", "book.txt", "--stride", "16",
        "--tasks", "tiny_choices", "--include-path", str(tasks), "--json",
        "evaluation.limit=3", "launch.nproc_per_node=1",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "code of the tasks in" in found.stderr
    record = json.loads(found.stdout)
    assert (record["step"], record["stride"], record["world_size"]) == (3, 16, 1)
    trained = record["models"]["trained"]
    assert 0 <= trained["tasks"]["tiny_choices"]["acc,none"] <= 1
    assert trained["num_rows"] > 5
    assert Path(record["file"]).name == "book-step-3.json"


def test_a_checkpoint_has_the_loss_that_was_logged(fsdpq: Run, finished: RunFiles) -> None:
    found = fsdpq("eval", str(finished.root), "--checkpoint", "3", "--json")
    assert found.returncode == 0, found.stderr
    own = [row for row in read_json_lines(finished.metrics) if row["event"] == "eval"]
    assert losses(json.loads(found.stdout)) == {"trained": own[1]["loss"]}


def test_what_cannot_be_measured_is_refused_before_anything_starts(
    finished: RunFiles, project: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDPQ_CACHE", environment["FSDPQ_CACHE"])
    monkeypatch.chdir(project)
    Path("book.txt").write_text("one two three")
    run, recipe = finished.root, Path("recipe.yaml")
    cases: list[tuple[Path, tuple[str, ...], Question, str]] = [
        (run, ("optimizer.lr=1",), Question(), "`optimizer.lr` has no effect on an evaluation"),
        (run, ("training.micro_batch_size=0",), Question(), "training.micro_batch_size"),
        (run, ("data.path=book.txt",), Question(), "`data.path` has no effect"),
        (run, ("data.format=text",), Question(), "`data.format` has no effect"),
        (run, ("data.format=alpaca",), Question(data="rows.jsonl"), "no `instruction`"),
        (run, (), Question(checkpoint="4"), "has no such checkpoint"),
        (run, (), Question(stride=8), "`--stride` cuts the text of `--data`"),
        (run, (), Question(data="rows.jsonl", stride=8), "no `text` in this row"),
        (run, (), Question(data="book.txt", stride=80), "longer than a window"),
        (run, (), Question(data="no.jsonl"), "is not there"),
        (recipe, (), Question(checkpoint="3"), "it has no checkpoints"),
        (recipe, ("data.eval_fraction=0.0",), Question(), "no rows were held out"),
        (project, (), Question(), "is no run directory"),
    ]
    for target, overrides, question, message in cases:
        with pytest.raises((UsageError, RecipeError)) as refused:
            evaluate(target, overrides, question, screen=PlainScreen(io.StringIO()))
        told = [refused.value.message]
        if isinstance(refused.value, RecipeError):
            told = [f"{problem.key} {problem.message}" for problem in refused.value.problems]
        assert any(message in text for text in told), (question, told)
