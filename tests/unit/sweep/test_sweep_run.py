"""Running trials: their outcomes, places, ends, and what a killed sweep finds again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_trials import fake_trial, many_trials, run_fake

from fsdpq.errors import UsageError
from fsdpq.fetch.holds import hold
from fsdpq.launch.machine.devices import select_visible
from fsdpq.launch.ranks.processes import StopSignals
from fsdpq.recipe.sections.launch import SlurmOptions
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import read_json_lines
from fsdpq.sweep.outcome import Outcome, read_outcome
from fsdpq.sweep.running.early_stopping import Curves, MedianRule
from fsdpq.sweep.running.ownership import owned_sweep, wait_for_trial
from fsdpq.sweep.running.slots import Slots
from fsdpq.sweep.running.trial_process import TrialOptions, start_overrides
from fsdpq.sweep.trial import Trial

GPUS = [f"GPU {index}: NVIDIA L4 (UUID: GPU-{index})" for index in range(4)]


@pytest.fixture
def files(tmp_path: Path) -> SweepFiles:
    return SweepFiles(tmp_path)


def starts_of(files: SweepFiles, trial_id: str) -> list[dict[str, object]]:
    return list(read_json_lines(files.run(trial_id).root / "starts.jsonl"))


def evaluations_of(files: SweepFiles, trial_id: str) -> list[int]:
    rows = read_json_lines(files.run(trial_id).metrics)
    return [row["step"] for row in rows if row["event"] == "eval"]


def test_a_failed_trial_does_not_stop_the_others_and_says_why(files: SweepFiles) -> None:
    trials = [
        fake_trial("bad", "exit=1 say=error:_the_disk_is_on_fire"),
        fake_trial("big", "exit=3 say=error:_needs_99_GiB"),
        fake_trial("good", "loss=1"),
        fake_trial("killed", "loss=1 crash_at=2"),
        fake_trial("broken", "exit=1 say=Traceback~this_is_a_bug_in_fsdpq:_report_it"),
    ]
    bad, big, good, killed, broken = run_fake(files, trials)
    assert (bad.status, bad.reason, bad.exit_code) == ("failed", "the disk is on fire", 1)
    assert (big.status, big.reason) == ("skipped", "needs 99 GiB")
    assert (good.status, good.reason, good.attempts) == ("finished", "", 1)
    assert (killed.status, killed.exit_code) == ("failed", -signal.SIGKILL)
    assert killed.reason == "`fsdpq train` was ended by SIGKILL"
    assert broken.reason == "Traceback"
    assert good.started is not None
    assert good.ended is not None
    assert good.started < good.ended


def test_settled_trials_are_left_alone_and_failed_ones_run_again_where_asked(
    files: SweepFiles,
) -> None:
    trials = [fake_trial("a", "loss=1"), fake_trial("b", "loss=1 crash_at=2")]
    run_fake(files, trials)
    again = run_fake(files, [*trials, fake_trial("c", "loss=1")])
    assert [outcome.status for outcome in again] == ["finished", "failed", "finished"]
    retried = run_fake(files, trials, retry_failed=True)
    assert [outcome.status for outcome in retried] == ["finished", "finished"]
    assert [len(starts_of(files, name)) for name in "abc"] == [1, 2, 1]


def test_what_cannot_fit_is_skipped_with_the_reason_and_looked_at_again(files: SweepFiles) -> None:
    trials = [fake_trial("a", "loss=1"), fake_trial("b", "loss=1")]
    small = {"b": "needs 30 GiB, the device has 24"}
    a, b = run_fake(files, trials, why_not=lambda trial: small.get(trial.id, ""))
    assert (a.status, b.status, b.reason) == ("finished", "skipped", small["b"])
    assert not files.run("b").root.exists()
    a, b = run_fake(files, trials, why_not=lambda _: "")
    assert (a.attempts, b.status, b.reason) == (1, "finished", "")


def note_when_it_runs(files: SweepFiles, stop: StopSignals, *heard: signal.Signals) -> None:
    """Sends signals to the runner, half a second apart, once trial a has made a step."""

    def note() -> None:
        wait_until(files.run("a").metrics.exists)
        for each in heard:
            stop.note(each)
            time.sleep(0.5)

    threading.Thread(target=note).start()


@pytest.mark.parametrize("heard", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_start_goes_on(
    files: SweepFiles, heard: signal.Signals
) -> None:
    trials = [fake_trial(name, "loss=1 step_s=0.1") for name in "ab"]
    stop = StopSignals()
    note_when_it_runs(files, stop, heard)
    first = run_fake(files, trials, stop=stop)
    assert [outcome.status for outcome in first] == ["interrupted", "waiting"]
    assert first[0].exit_code == 75
    # Slurm tells trials too, and what they hear twice they take as "at once".
    asked = (files.run("a").root / "asked").read_text()
    assert asked == ("SIGTERM" if heard == signal.SIGUSR1 else "SIGUSR1")
    cut_off_at = max(evaluations_of(files, "a"))
    second = run_fake(files, trials)
    assert [outcome.status for outcome in second] == ["finished", "finished"]
    assert [outcome.attempts for outcome in second] == [2, 1]
    assert sorted(set(evaluations_of(files, "a"))) == [0, 2, 4, 6]
    assert cut_off_at < 6


def test_a_second_signal_ends_at_once(files: SweepFiles) -> None:
    stop = StopSignals()
    note_when_it_runs(files, stop, signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    [outcome] = run_fake(files, [fake_trial("a", "loss=1 step_s=30")], stop=stop)
    assert time.monotonic() - started < 25
    assert (outcome.status, outcome.exit_code) == ("interrupted", -signal.SIGKILL)


def start_runner(files: SweepFiles) -> subprocess.Popen[bytes]:
    """Starts a process that runs 12 trials of six steps in a directory, two at once."""
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "support.fake_trials", str(files.root)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})


def table_of(files: SweepFiles, trials: list[Trial]) -> list[tuple[object, ...]]:
    """Returns of each trial how it ended, why, and the losses that count."""
    outcomes = [read_outcome(files, trial.id) for trial in trials]
    curves = Curves(files)
    return [(o.id, o.status, o.reason, o.exit_code, curves.of(o.id)) for o in outcomes]


def test_a_sweep_that_is_killed_again_and_again_gives_the_table_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    trials = many_trials(12, step_s=0.05)
    peaceful, killed = SweepFiles(tmp_path / "peaceful"), SweepFiles(tmp_path / "killed")
    run_fake(peaceful, many_trials(12, step_s=0), parallel=4)
    chance, runners = random.Random(5), list[subprocess.Popen[bytes]]()
    for blow in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before = time.time()
        runners.append(runner := start_runner(killed))
        # Not waited for after a kill: trials must see that a zombie is gone, too.
        wait_until(
            lambda runner=runner, before=before: (
                runner.poll() is not None
                or any(path.stat().st_mtime > before for path in killed.root.glob("outcomes/t*"))
            )
        )
        time.sleep(chance.uniform(0, 0.4))
        runner.send_signal(blow)
        if blow == signal.SIGTERM:
            runner.wait()
            assert "running" not in {read_outcome(killed, t.id).status for t in trials}
    outcomes = run_fake(killed, trials, parallel=2)
    assert table_of(killed, trials) == table_of(peaceful, trials)
    assert max(outcome.attempts for outcome in outcomes) > 1
    assert [o.status for o in outcomes].count("failed") == 3
    for runner in runners:
        runner.wait()


def test_a_trial_that_is_at_work_is_waited_for(files: SweepFiles) -> None:
    run, told = files.run("a"), list[str]()
    run.logs.mkdir(parents=True)
    for place in (run.root, run.logs):
        with hold(place):
            assert not wait_for_trial(run, report=told.append, is_over=lambda: True)
    assert told == ["waiting for trial a of an earlier start to save and end"] * 2
    assert wait_for_trial(run, report=told.append, is_over=lambda: True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_runner_at_a_time(files: SweepFiles) -> None:
    words = f"in use: process {os.getpid()} on .* runs it"
    with owned_sweep(files), pytest.raises(UsageError, match=words), owned_sweep(files):
        pass
    with owned_sweep(files):
        pass


def test_trials_run_at_once_on_gpus_of_their_own(files: SweepFiles) -> None:
    trials = [
        fake_trial(name, "loss=1 step_s=0.05", device="cuda", nproc_per_node=ranks)
        for name, ranks in (("a", 2), ("b", "auto"), ("c", "auto"), ("d", 4))
    ]
    outcomes = run_fake(files, trials, parallel=3, gpus=GPUS)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    visible = [starts_of(files, name)[0]["CUDA_VISIBLE_DEVICES"] for name in "abcd"]
    assert visible[:3] == ["GPU-0,GPU-1", "GPU-2", "GPU-3"]
    assert select_visible(GPUS, str(visible[0])) == GPUS[:2], "as `fsdpq train` reads it"
    assert sorted(str(visible[3]).split(",")) == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    a, b, c, d = outcomes
    assert max(float(o.started or 0) for o in (a, b, c)) < min(float(o.ended or 0) for o in (a, b))
    assert float(d.started or 0) >= max(float(o.ended or 0) for o in (a, b, c))


def test_cores_are_shared_on_a_cpu_and_one_trial_has_the_machine(
    files: SweepFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsdpq.sweep.running.slots.count_cores", lambda: 8)
    recipe = fake_trial("a", "").recipe
    slots = Slots(2, gpus=[], threads_are_set=False)
    first = slots.take("a", recipe)
    assert first is not None
    assert dict(first.environment) == {"OMP_NUM_THREADS": "4"}
    assert slots.take("b", recipe) is not None
    assert slots.take("c", recipe) is None
    slots.give_back("a")
    assert slots.take("c", recipe) is not None
    alone = Slots(1, gpus=GPUS, threads_are_set=False).take("a", recipe)
    chosen = Slots(2, gpus=[], threads_are_set=True).take("a", recipe)
    assert alone is not None
    assert chosen is not None
    assert (alone.environment, chosen.environment) == ((), ())


def test_a_trial_that_never_has_a_place_is_skipped_and_the_others_run(files: SweepFiles) -> None:
    trials = [
        fake_trial("big", "loss=1", device="cuda", nproc_per_node=8),
        fake_trial("small", "loss=1", device="cuda", nproc_per_node=1),
    ]
    big, small = run_fake(files, trials, parallel=2, gpus=GPUS)
    assert (big.status, small.status) == ("skipped", "finished")
    assert big.reason == "`launch.nproc_per_node` is 8, and there are 4 GPUs"


CURVES = [("a", 1.0), ("b", 3.0), ("c", 2.5), ("d", 1.2), ("e", 0.5)]
HOPELESS = {"c": 2}
"""Of a and b the median at step 2 is that of 1 + 4 and 3 + 4: c's 2.5 + 4 is above."""


def outcomes_by_id(outcomes: list[Outcome]) -> dict[str, tuple[str, int | None]]:
    return {outcome.id: (outcome.status, outcome.step) for outcome in outcomes}


@pytest.mark.parametrize("step_s", [0, 0.05])
def test_hopeless_trials_end_at_the_same_step_however_fast_they_are(
    files: SweepFiles, step_s: float
) -> None:
    trials = [fake_trial(name, f"loss={loss} step_s={step_s}") for name, loss in CURVES]
    outcomes = run_fake(files, trials, rule=MedianRule(min_steps=1, min_trials=2))
    assert outcomes_by_id(outcomes) == {
        "a": ("finished", None), "b": ("finished", None), "c": ("hopeless", 2),
        "d": ("finished", None), "e": ("finished", None),
    }  # fmt: skip
    assert outcomes[2].reason == (
        "held-out loss 6.5000 at step 2: the median of 2 others is 6.0000"
    )


def test_a_trial_that_was_hopeless_when_its_runner_died_is_not_started_again(
    files: SweepFiles,
) -> None:
    trials = [fake_trial(name, f"loss={loss}") for name, loss in CURVES[:3]]
    run_fake(files, trials)
    path = files.outcome("c")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    outcomes = run_fake(files, trials, rule=MedianRule(min_steps=1, min_trials=2))
    assert outcomes_by_id(outcomes)["c"] == ("hopeless", 2)
    assert len(starts_of(files, "c")) == 1


def test_the_median_rule_waits_for_steps_and_trials() -> None:
    own, others = {0: 9.0, 2: 5.0, 4: 4.0, 6: 3.0}, [{2: 1.0, 4: 1.0}, {2: 2.0, 4: 9.0}]

    def judged(**rule: int) -> int | None:
        found = MedianRule(**rule).judge(own, others, total_steps=6)
        return None if found is None else found.step

    assert judged(min_steps=1, min_trials=2) == 2
    assert judged(min_steps=3, min_trials=2) is None, "4.0 is better than the median of 1 and 9"
    assert judged(min_steps=1, min_trials=3) is None
    last = MedianRule(min_steps=1, min_trials=1).judge(own, [{6: 0.1}], total_steps=6)
    assert last is None, "at the last step nothing is saved by an end"
    lost = MedianRule(min_steps=1, min_trials=1).judge({2: float("nan")}, others, total_steps=6)
    assert lost is not None
    assert lost.step == 2


def test_a_trial_starts_here_and_goes_on_whatever_its_recipe_says() -> None:
    trial = fake_trial("a", "")
    launch = trial.recipe.launch.model_copy(
        update={"scheduler": "slurm", "slurm": SlurmOptions(partition="gpu", requeue=True)}
    )
    recipe = trial.recipe.model_copy(update={"launch": launch})
    assert start_overrides(recipe, TrialOptions()) == [
        "checkpoint.resume=auto", "launch.scheduler=local", "launch.slurm.partition=null",
        "launch.slurm.requeue=false",
    ]  # fmt: skip
    sinks = trial.recipe.metrics.model_copy(update={"sinks": ("jsonl", "wandb")})
    recipe = trial.recipe.model_copy(update={"metrics": sinks})
    options = TrialOptions(sweep_name="it's, a sweep", smoke=True)
    assert start_overrides(recipe, options) == ["metrics.wandb.group='it\\'s, a sweep'"]
