"""Made-up results of sweeps, and sweep directories with the files that trials leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import append_json_line
from fsdpq.sweep.outcome import Outcome, write_outcome
from fsdpq.sweep.results.results import Goal, Results, TrialResult, rank_trials


def make_trial(index: int, *, status="finished", reason="", settings=None, **measures):
    """Returns a trial ``0000000<index>`` of the rank ``8 * (index + 1)``, its loss in measures."""
    settings = {"adapter.rank": 8 * (index + 1)} if settings is None else settings
    return TrialResult(
        id=f"{index:08x}",
        label=", ".join(f"{key}={value}" for key, value in settings.items()),
        status=status,
        reason=reason,
        settings=settings,
        overrides=tuple(f"{key}={value}" for key, value in settings.items()),
        measures=measures,
        source=Path("recipe.yaml"),
        base_dir=Path("/recipes"),
    )


def make_results(*trials: TrialResult, name="demo", goal="eval_loss", **fields: Any) -> Results:
    """Returns results of ``trials``, ranked."""
    wanted = Goal(goal)
    return Results(name, wanted, tuple(rank_trials(trials, wanted)), **fields)


def losses(*values: float) -> list[TrialResult]:
    """Returns finished trials with these held-out losses."""
    return [make_trial(index, eval_loss=value) for index, value in enumerate(values)]


def write_run(files: SweepFiles, trial: TrialResult, *, num_steps=12, start=4.0) -> None:
    """Writes what a run leaves whose held-out loss goes from ``start`` to the trial's."""
    run = files.run(trial.id)
    run.root.mkdir(parents=True, exist_ok=True)
    end = trial.measures.get("eval_loss", start)
    setup = {"event": "setup", "num_trainable": 4096, "total_steps": num_steps, "time": 1.0}
    append_json_line(run.events, {"event": "phase", "name": "data", "time": 0.0})
    append_json_line(run.events, setup)
    for step in range(num_steps + 1):
        loss = start + (end - start) * step / num_steps
        row = {"step": step, "total_steps": num_steps, "loss": loss, "time": 2.0 + step}
        if step:
            append_json_line(run.metrics, {"event": "step", **row, "tokens_per_s": 100.0 + step})
        if step % 3 == 0:
            append_json_line(run.metrics, {"event": "eval", **row})
    if trial.finished:
        done = {"event": "done", "steps": num_steps, "train_s": 12.0, "trained_tokens": 900}
        done |= {"eval_loss_before": start, "eval_loss_after": end, "time": 20.0}
        append_json_line(run.events, done | {"peak_memory_bytes": [7], "peak_host_bytes": [9]})
        run.report_html.write_text("<!DOCTYPE html><title>run</title>")
    packages = {"torch": "2.13.0", "pyarrow": "26.0.1"}
    run.lock.write_text(json.dumps({"fsdpq": "0.9", "packages": packages, "recipe": "r.yaml"}))


def write_sweep(root: Path, results: Results) -> SweepFiles:
    """Writes outcomes, frozen recipes and runs; skipped and waiting trials have no run."""
    files = SweepFiles(root)
    (root / "recipes").mkdir(parents=True, exist_ok=True)
    for trial in results.trials:
        write_outcome(files, Outcome(trial.id, trial.status, trial.reason))
        files.recipe(trial.id).write_text(f"version: 1\nname: trial {trial.id}\n")
        if trial.status not in ("skipped", "waiting"):
            write_run(files, trial)
    return files
