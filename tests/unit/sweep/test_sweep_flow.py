"""A sweep from its recipe to its table: run, cut off, run again with more values, searched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_trials import FAKE_TRAIN, RECIPE, SilentScreen

from fsdpq.errors import EnvironmentProblemError, ExitCode, RecipeError, UsageError
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.sweep.choosing.spec import LoadedSpec, read_spec, recipe_spec
from fsdpq.sweep.results.collect import collect_results
from fsdpq.sweep.results.measures import is_deterministic
from fsdpq.sweep.running.flow import list_sweep, run_sweep
from fsdpq.sweep.running.request import SweepEnd, SweepRequest

RANKS = "adapter.rank=4,8,16"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    return Path("recipe.yaml")


def run(
    loaded: LoadedSpec, *, out: str = "out", screen: SilentScreen | None = None, **request: Any
) -> SweepEnd:
    wanted = SweepRequest(out=Path(out), train=FAKE_TRAIN, **request)
    return run_sweep(loaded, wanted, screen=screen or SilentScreen())


def statuses(end: SweepEnd) -> list[str]:
    return [outcome.status for outcome in end.outcomes]


def starts_of(end: SweepEnd) -> list[int]:
    runs = [end.files.run(trial.id).root for trial in end.trials]
    return [sum(1 for _ in read_json_lines(root / "starts.jsonl")) for root in runs]


def test_a_sweep_runs_once_and_new_values_are_added_to_it(recipe: Path) -> None:
    first = run(recipe_spec(recipe, [RANKS]))
    assert (statuses(first), first.exit_code) == (["finished"] * 3, ExitCode.OK)
    assert [trial.settings for trial in first.trials] == [{"adapter.rank": r} for r in (4, 8, 16)]
    results = collect_results(first.files)
    assert [trial.measures["eval_loss"] for trial in results.trials] == pytest.approx(
        [4.001, 8.001, 16.001]
    )
    more = run(recipe_spec(recipe, ["adapter.rank=2,8,32"]))
    assert [trial.settings["adapter.rank"] for trial in more.trials] == [4, 8, 16, 2, 32]
    assert starts_of(more) == [1] * 5
    arguments = next(read_json_lines(more.files.run(more.trials[0].id).root / "starts.jsonl"))
    assert str(Path.cwd()) in arguments["arguments"]


def test_a_directory_runs_its_frozen_trials_whatever_became_of_the_recipe(recipe: Path) -> None:
    first = run(recipe_spec(recipe, [RANKS]), only=())
    shutil.rmtree(first.files.root / "outcomes")
    recipe.write_text(RECIPE.replace("lr: 1e-3", "lr: 1e-2"))
    loaded = read_spec(first.files.spec)
    assert loaded.name == "recipe"
    again = run(loaded, as_frozen=True)
    assert [trial.id for trial in again.trials] == [trial.id for trial in first.trials]
    assert len(run(recipe_spec(recipe, [RANKS])).trials) == 6


def test_only_some_trials_run_and_the_list_shows_all(recipe: Path) -> None:
    loaded, out = recipe_spec(recipe, [RANKS]), Path("out")
    listed = list_sweep(loaded, SweepRequest(out=out), screen=SilentScreen())
    assert not out.exists()
    assert [row.outcome.status for row in listed] == ["waiting"] * 3
    end = run(loaded, only=(listed[1].trial.id,))
    assert (statuses(end), end.exit_code) == (["waiting", "finished", "waiting"], ExitCode.OK)
    with pytest.raises(UsageError, match="no trial `other`"):
        run(loaded, only=("other",))
    big = ["model.name_or_path=meta-llama/Llama-3.1-8B,meta-llama/Llama-3.1-70B"]
    loaded = recipe_spec(recipe, [*big, "launch.device=cuda", "data.seq_len=512"])
    wanted = SweepRequest(out=Path("big"), gpus="1x24GiB")
    fitting = list_sweep(loaded, wanted, screen=SilentScreen())
    assert [row.outcome.status for row in fitting] == ["waiting", "skipped"]
    assert "and has 24.00 GiB" in fitting[1].outcome.reason
    texts = ["model.name_or_path=meta-llama/Llama-3.1-70B", "adapter.rank=8,16"]
    texts += ["launch.device=cuda", "launch.nproc_per_node=auto", "data.seq_len=512"]
    for parallel, becomes in ((1, "waiting"), (2, "skipped")):  # of two GPUs each has one
        wanted = SweepRequest(out=Path("big"), gpus="2x40GiB")
        shared = recipe_spec(recipe, texts, {"parallel": parallel})
        rows = list_sweep(shared, wanted, screen=SilentScreen())
        assert [row.outcome.status for row in rows] == [becomes] * 2
    planned = run(loaded, out="big", gpus="1x8GiB")
    assert (statuses(planned), planned.exit_code) == (["skipped"] * 2, ExitCode.DOES_NOT_FIT)


def test_what_a_sweep_cannot_do_is_refused_before_anything_runs(recipe: Path) -> None:
    stopping = {"early_stopping.kind": "median", "parallel": 2}
    texts = [RANKS, "training.eval_interval=null", "launch.rdzv_endpoint=127.0.0.1:29500"]
    with pytest.raises(RecipeError) as caught:
        run(recipe_spec(recipe, texts, stopping))
    assert [problem.key for problem in caught.value.problems] == [
        "early_stopping", "launch.rdzv_endpoint",
    ]  # fmt: skip
    assert not Path("out").exists()
    Path("file").touch()
    with pytest.raises(EnvironmentProblemError, match="cannot be written: Not a directory"):
        run(recipe_spec(recipe, [RANKS]), out="file/out")
    Path("full").mkdir()
    (Path("full") / "file").touch()
    with pytest.raises(UsageError, match="holds no sweep"):
        run(recipe_spec(recipe, [RANKS]), out="full")


SEARCH = ["adapter.rank=4,8,16", "optimizer.lr=tag(log,interval(1e-4,1e-1))"]


def search(recipe: Path, *, trials: int, **changes: Any) -> LoadedSpec:
    strategy: Mapping[str, Any] = {"strategy.kind": "optuna", "strategy.trials": trials}
    return recipe_spec(recipe, SEARCH, {**strategy, **changes})


def settings_of(end: SweepEnd) -> Sequence[Mapping[str, Any]]:
    return [trial.settings for trial in end.trials]


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_search_that_was_cut_off_asks_for_the_same_trials(recipe: Path, parallel: int) -> None:
    whole = run(search(recipe, trials=12, parallel=parallel))
    assert set(statuses(whole)) == {"finished"}
    assert len({json.dumps(settings) for settings in settings_of(whole)}) == len(whole.trials)

    run(search(recipe, trials=5, parallel=parallel), out="cut")
    cut = SweepFiles(Path("cut"))
    last = json.loads(cut.trials.read_text())["trials"][-1]["id"]
    outcome = cut.outcome(last)  # as a runner leaves it that is killed while the trial runs
    outcome.write_text(json.dumps(json.loads(outcome.read_text()) | {"status": "running"}))
    went_on = run(search(recipe, trials=12, parallel=parallel), out="cut")
    assert settings_of(went_on) == settings_of(whole)
    assert [o.attempts for o in went_on.outcomes].count(2) == 1
    if parallel == 1:
        worst = run(search(recipe, trials=12, **{"goal.direction": "maximize"}), out="worst")
        assert settings_of(worst)[:10] == settings_of(whole)[:10], "the first ten are by chance"
        assert settings_of(worst)[10:] != settings_of(whole)[10:]
    # Where it goes on on another machine, more may run at once, and the rounds stay.
    again = run(search(recipe, trials=12, parallel=4), out="cut")
    assert starts_of(again) == starts_of(went_on)


def test_a_sweep_that_is_stopped_says_so(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("loss=rank+lr", "loss=rank+lr step_s=0.2"))

    def stop() -> None:
        deadline = time.monotonic() + 60
        while not list(Path("out").glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    end = run(recipe_spec(recipe, [RANKS]))
    thread.join()
    assert (end.stopped_by, end.exit_code) == ("SIGTERM", ExitCode.SAVED)
    assert statuses(end) == ["interrupted", "waiting", "waiting"]
    lost = replace(end, outcomes=(replace(end.outcomes[0], exit_code=130), *end.outcomes[1:]))
    assert lost.exit_code == ExitCode.INTERRUPTED, "nothing was saved"


def test_what_a_hopeless_trial_did_after_its_end_was_decided_does_not_count(recipe: Path) -> None:
    tables: list[list[tuple[object, ...]]] = []
    for speed in (0, 0.05):
        recipe.write_text(RECIPE.replace("loss=rank+lr", f"loss=rank+lr step_s={speed}"))
        stopping = {"early_stopping.kind": "median", "early_stopping.min_steps": 1}
        stopping = {**stopping, "early_stopping.min_trials": 2}
        end = run(recipe_spec(recipe, ["adapter.rank=4,8,16,2"], stopping), out=f"at-{speed}")
        table = list[tuple[object, ...]]()
        for row in collect_results(end.files).trials:
            numbers = [(n, v) for n, v in row.measures.items() if is_deterministic(n)]
            table.append((row.id, row.status, row.rank, row.reason, *numbers))
        tables.append(table)
    assert tables[0] == tables[1]
    hopeless = tables[0][-1]
    assert hopeless[1:3] == ("hopeless", None)
    assert ("steps", 2) in hopeless
    assert ("eval_loss", 20.001) in hopeless
