"""A sweep as an array of Slurm's: what is submitted, what a task does, what is submitted again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.fake_trials import FAKE_TRAIN, RECIPE, SilentScreen

from fsdpq.errors import ExitCode, RecipeError, UsageError
from fsdpq.sweep.choosing.spec import LoadedSpec, read_spec, recipe_spec
from fsdpq.sweep.outcome import Outcome
from fsdpq.sweep.running.array import task_exit_code
from fsdpq.sweep.running.flow import run_sweep
from fsdpq.sweep.running.request import SweepEnd, SweepRequest
from fsdpq.sweep.running.submission import run_task, show_array

AS_A_JOB = "device: cpu, scheduler: slurm, slurm: {partition: night}}"
FOR_SLURM = RECIPE.replace("device: cpu}", AS_A_JOB)
SBATCH = '#!/bin/sh\ncp "$2" submitted.sh\necho 17\n'
SQUEUE = "#!/bin/sh\ncat squeue.txt\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory, and tools of Slurm's that note what they are asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("sacct", "#!/bin/sh\nexit 1\n")):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "recipe.yaml").write_text(FOR_SLURM)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "squeue.txt").write_text("")
    return Path("recipe.yaml")


def sweep(recipe: Path, *texts: str, **changes: Any) -> LoadedSpec:
    return recipe_spec(recipe, ["adapter.rank=4,8,16", *texts], {"scheduler": "slurm", **changes})


def wanted(**others: Any) -> SweepRequest:
    return SweepRequest(out=Path("out"), train=FAKE_TRAIN, **others)


def go_on(loaded: LoadedSpec, screen: SilentScreen | None = None) -> SweepEnd:
    return run_sweep(loaded, wanted(), screen=screen or SilentScreen())


def test_an_array_has_a_task_a_trial_and_what_is_left_is_submitted_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = sweep(recipe, parallel=2)
    end = go_on(loaded)
    assert (end.job, end.exit_code) == (17, ExitCode.OK)
    script = Path("submitted.sh").read_text()
    assert "#SBATCH --array=0-2%2" in script
    assert "#SBATCH --partition=night" in script
    assert "--array-task" in script
    assert str(Path("out").absolute()) in script

    Path("squeue.txt").write_text("17|0|RUNNING|None|node1|1:00|now\n17|1|PENDING|Res||1:00|\n")
    Path("submitted.sh").unlink()
    screen = SilentScreen()
    at_work = go_on(loaded, screen)
    assert at_work.exit_code == ExitCode.SAVED
    assert screen.lines[-1] == "array 17 is at work: 1 of its trials run, 1 wait"
    assert not Path("submitted.sh").exists()

    frozen = read_spec(end.files.spec)
    for task in ("0", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        outcome = run_task(frozen, wanted(as_frozen=True), screen=SilentScreen())
        assert (outcome.status, outcome.id) == ("finished", end.trials[int(task)].id)
        assert task_exit_code(outcome) == 0
    Path("squeue.txt").write_text("17|0|COMPLETED|None|node1||\n17|2|COMPLETED|None|node1||\n")
    again = go_on(loaded)
    assert again.job == 17
    assert "#SBATCH --array=0-0%2" in Path("submitted.sh").read_text()
    tasks = json.loads((end.files.root / "slurm" / "array.json").read_text())["trials"]
    assert tasks == [end.trials[1].id]

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    run_task(frozen, wanted(), screen=SilentScreen())
    Path("squeue.txt").write_text("")
    done = go_on(loaded)
    assert (done.job, done.exit_code) == (None, ExitCode.OK)


def test_the_script_is_shown_without_making_anything(recipe: Path) -> None:
    script = show_array(sweep(recipe, parallel="auto"), wanted(), screen=SilentScreen())
    assert "#SBATCH --array=0-2\n" in script
    assert not Path("out").exists()
    here = recipe_spec(recipe, ["launch.scheduler=local", "launch.slurm.partition=null"])
    with pytest.raises(UsageError, match="runs on this machine"):
        show_array(here, wanted(), screen=SilentScreen())


def test_what_cannot_be_one_array_is_refused(recipe: Path) -> None:
    def problems(loaded: LoadedSpec) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            go_on(loaded)
        return [problem.key for problem in caught.value.problems]

    assert problems(recipe_spec(recipe, ["adapter.rank=4,8"])) == ["launch.scheduler"]
    assert problems(sweep(recipe, "launch.nproc_per_node=1,2")) == ["launch.nproc_per_node"]
    partitions = sweep(recipe, "launch.slurm.partition=day,night")
    assert problems(partitions) == ["launch.slurm"]
    search = sweep(recipe, **{"strategy.kind": "optuna", "strategy.trials": 3})
    assert problems(search) == ["strategy.kind"]


def test_a_task_that_was_interrupted_tells_its_job_to_queue_again() -> None:
    assert task_exit_code(Outcome("a", "interrupted", exit_code=75)) == 75
    assert task_exit_code(Outcome("a", "interrupted", exit_code=-15)) == 143
    assert task_exit_code(Outcome("a", "interrupted")) == 130
    assert task_exit_code(Outcome("a", "failed", exit_code=1)) == 1
    assert task_exit_code(Outcome("a", "hopeless", exit_code=75)) == 0


def test_a_task_needs_slurm(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = go_on(sweep(recipe))
    loaded = read_spec(end.files.spec)
    for number in ("", "3", "-1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", number)
        with pytest.raises(UsageError, match="has no trial for the task"):
            run_task(loaded, wanted(), screen=SilentScreen())
