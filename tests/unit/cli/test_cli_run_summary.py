"""What is said at the end of a run, for people and as JSON, whether it finished or not."""

import json
import re
from pathlib import Path

import pytest
from support.told_runs import ToldRun

from fsdpq.cli.run_result import result_fields
from fsdpq.cli.screens.summary import summary_lines
from fsdpq.errors import LaunchError, RunSavedError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToldRun:
    monkeypatch.chdir(tmp_path)
    return ToldRun(Path("runs/mine"), total_steps=12)


def finished(run: ToldRun) -> ToldRun:
    run.launch().phase("data", "load", "train").eval(0, 3.0)
    run.event("sample", when="before", prompt="Who?", answer="Me\nand you")
    run.step(*range(1, 8)).eval(7, 1.5).step(*range(8, 13)).eval(12, 2.0)
    run.event("sample", when="after", prompt="Who?", answer="You")
    return run.done(12).launch(ended=run.now, exit_code=0)


def test_a_finished_run_is_summed_up(run: ToldRun) -> None:
    finished(run).files.report_html.touch()
    run.files.plan.write_text(
        json.dumps({"device": {"type": "cuda", "peak_bytes": 2**30}, "host": {"peak_bytes": 2**33}})
    )
    assert "\n".join(summary_lines(run.files)) == (
        """
12 steps in 0:06: 640 tokens, 320 of them with loss, 640 tokens/s

                 before  best, step 7  after
  held-out loss  3.0000  1.5000        2.0000
  perplexity     20.09   4.48          7.39

  Who?
    before  Me and you
    after   You

  training loss  10.0000 at step 1, 1.6032 over the last 10 logged
  peak memory    1.00 GiB, 512.00 MiB (one number per rank); planned 1.00 GiB
  adapter        runs/mine/adapter
  metrics        runs/mine/metrics.jsonl
  report         runs/mine/report.html
  try            fsdpq generate runs/mine --prompt 'Who?'
"""
    )


def test_a_run_that_was_stopped_says_how_far_it_came_and_how_to_go_on(run: ToldRun) -> None:
    run.launch().phase("data", "load", "train").eval(0, 3.0)
    run.event("sample", when="before", prompt="Who?", answer="")
    run.step(1, 2, 3).eval(2, 2.5).checkpoint(3)
    assert "\n".join(summary_lines(run.files)) == (
        """
3 of 12 steps: 192 tokens, 96 of them with loss, 640 tokens/s

                 before  step 2
  held-out loss  3.0000  2.5000
  perplexity     20.09   12.18

  Who?
    before

  training loss  10.0000 at step 1, 3.3333 at step 3
  metrics        runs/mine/metrics.jsonl
  logs           runs/mine/logs
  saved          step 3, runs/mine/checkpoints/step-00000003
  go on          fsdpq resume runs/mine
"""
    )


def test_before_its_first_step_there_is_nothing_to_sum_up(run: ToldRun) -> None:
    run.launch().phase("data", "load")
    assert summary_lines(run.files) == []


def test_json_of_a_finished_run(run: ToldRun) -> None:
    found = json.loads(json.dumps(result_fields(finished(run).files)))
    assert (found["ok"], found["exit_code"], found["state"]) == (True, 0, "finished")
    assert (found["run_dir"], found["step"], found["total_steps"]) == ("runs/mine", 12, 12)
    assert found["measures"]["best_eval_loss"] == 1.5
    assert found["measures"]["eval_loss"] == 2.0
    assert found["eval_loss_before"] == 3.0
    assert found["peak_memory_bytes_per_rank"] == [2**30, 2**29]
    assert found["paths"]["metrics"] == "runs/mine/metrics.jsonl"
    assert found["paths"]["checkpoint"] is None
    assert found["samples"] == [{"prompt": "Who?", "before": "Me\nand you", "after": "You"}]


def test_json_of_a_run_that_ended_early_has_its_error_and_its_checkpoint(run: ToldRun) -> None:
    run.launch(ended=run.now, exit_code=75).phase("train").step(1, 2).checkpoint(2)
    found = result_fields(run.files, RunSavedError("stopped by SIGTERM after step 2 of 12"))
    assert (found["ok"], found["exit_code"], found["state"]) == (False, 75, "saved")
    assert found["problems"][0]["message"] == "stopped by SIGTERM after step 2 of 12"
    assert found["paths"]["checkpoint"] == "runs/mine/checkpoints/step-00000002"
    assert found["measures"]["train_loss"] == pytest.approx(7.5)


def test_json_without_a_run_directory_has_the_error_alone() -> None:
    found = result_fields(None, LaunchError("no", hint="do"))
    assert set(found) == {"ok", "problems", "exit_code", "run_dir"}
    assert found["run_dir"] is None


def test_summary_of_a_quick_run_has_no_column_twice(run: ToldRun) -> None:
    run.launch().phase("train").eval(0, 3.0).step(1).eval(1, 2.0).done(1)
    table = next(line for line in summary_lines(run.files) if "before" in line)
    assert re.split(r"\s{2,}", table.strip()) == ["before", "after"]
