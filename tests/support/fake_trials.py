"""Sweeps over trials that a stand-in trains; as a program it runs one in a directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fsdpq.launch.ranks.processes import StopSignals, catch_stop_signals
from fsdpq.launch.ranks.torchrun import Row
from fsdpq.recipe.load import dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import Outcome
from fsdpq.sweep.running.run import RunOptions, TrialRunner
from fsdpq.sweep.running.slots import Slots
from fsdpq.sweep.running.trial_process import TrialOptions
from fsdpq.sweep.trial import Trial

RECIPE = """\
version: 1
name: tiny
description: loss=rank+lr
model: {name_or_path: meta-llama/Llama-3.2-1B}
quantization: {kind: bnb}
adapter: {kind: lora, rank: 8}
data: {path: rows.jsonl, eval_fraction: 0.5}
optimizer: {kind: adamw, lr: 1e-3}
lr_scheduler: {kind: constant}
training: {steps: 6, eval_interval: 2}
launch: {nproc_per_node: 1, device: cpu}
"""
"""A recipe for the stand-in, which reads in its description how losses come about."""

FAKE_TRAIN = (sys.executable, str(Path(__file__).parents[1] / "unit/sweep/fake_trainer.py"))


class SilentScreen:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ended: list[Outcome] = []

    def report(self, message: str) -> None:
        """Notes a line."""
        self.lines.append(message)

    def expect(self, trials: Sequence[Trial], settled: int) -> None:
        """Notes how many there are."""
        self.lines.append(f"{len(trials)} trials, {settled} settled")

    def show_start(self, trial: Trial, outcome: Outcome) -> None:
        """Notes a start."""
        self.lines.append(f"start {trial.id} {outcome.attempts}")

    def show_row(self, trial: Trial, row: Row) -> None:
        """Takes no notice of rows."""

    def show_end(self, trial: Trial, outcome: Outcome) -> None:
        """Notes an end."""
        assert trial.id == outcome.id
        self.ended.append(outcome)

    def close(self) -> None:
        """Has nothing to close."""


def fake_trial(name: str, description: str, **launch: object) -> Trial:
    """Returns a trial for the stand-in, see ``fake_trainer.py``."""
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": name,
            "description": description,
            "model": {"name_or_path": "tiny"},
            "quantization": {"kind": "bnb"},
            "adapter": {"kind": "lora"},
            "data": {"path": "rows.jsonl"},
            "optimizer": {"kind": "adamw"},
            "lr_scheduler": {"kind": "constant"},
            "launch": {"device": "cpu", "nproc_per_node": 1, **launch},
        }
    )
    return Trial(name, recipe, base_dir=Path("/nowhere"))


def write_recipes(files: SweepFiles, trials: Sequence[Trial]) -> None:
    """Writes the frozen recipes."""
    for trial in trials:
        path = files.recipe(trial.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(trial.recipe))


def run_fake(
    files: SweepFiles,
    trials: Sequence[Trial],
    *,
    parallel: int = 1,
    gpus: Sequence[str] = (),
    screen: SilentScreen | None = None,
    stop: StopSignals | None = None,
    **options: object,
) -> list[Outcome]:
    """Runs trials by the stand-in and returns what became of them."""
    write_recipes(files, trials)
    runner = TrialRunner(
        files,
        RunOptions(TrialOptions(train=FAKE_TRAIN), smallest_pause_s=0.02, **options),  # pyright: ignore[reportArgumentType]
        slots=Slots(parallel, gpus=gpus, threads_are_set=False),
        screen=screen or SilentScreen(),
        stop=stop or StopSignals(),
    )
    return runner.run(trials)


def many_trials(number: int, *, step_s: float) -> list[Trial]:
    """Returns so many trials, of which every fifth fails at its third step, the first time."""
    crash = {0: " crash_at=3"}
    return [
        fake_trial(f"t{index:02}", f"loss={index % 7} step_s={step_s}{crash.get(index % 5, '')}")
        for index in range(number)
    ]


if __name__ == "__main__":
    with catch_stop_signals() as heard:
        run_fake(
            SweepFiles(Path(sys.argv[1])), many_trials(12, step_s=0.05), parallel=2, stop=heard
        )
