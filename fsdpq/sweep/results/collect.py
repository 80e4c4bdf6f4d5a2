"""From a sweep directory to results, and from results to the files that show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import yaml

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.runs.lock_file import as_mapping
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.choosing.options import GoalOptions
from fsdpq.sweep.frozen import read_frozen
from fsdpq.sweep.results.measures import Direction
from fsdpq.sweep.results.page import write_page
from fsdpq.sweep.results.results import Goal, Results, collect_trials, read_environment
from fsdpq.sweep.results.written import write_best, write_tables

DIRECTIONS: dict[str, Direction] = {"minimize": "lower", "maximize": "higher"}


def collect_results(files: SweepFiles) -> Results:
    """Returns what came of the sweep in a directory so far.

    Args:
        files: the sweep directory; its runs may still be going on.

    Raises:
        UsageError: it holds no sweep.
        CheckpointError: its ``trials.json`` cannot be read.
    """
    spec = _read_spec(files)
    wanted = as_mapping(spec.get("goal"))
    measure = str(wanted.get("measure", "eval_loss"))
    goal = Goal(measure, DIRECTIONS.get(str(wanted.get("direction"))))
    smoke = spec.get("smoke") is True
    trials = collect_trials(files, read_frozen(files), goal, smoke=smoke)
    return Results(
        name=str(spec.get("name") or files.root.name),
        goal=goal,
        trials=tuple(trials),
        smoke=smoke,
        environment=read_environment([files.run(trial.id) for trial in trials]),
    )


def goal_of(options: GoalOptions) -> Goal:
    """Returns the goal that a sweep's spec names."""
    return Goal(options.measure, DIRECTIONS.get(options.direction))


def write_results(files: SweepFiles, results: Results) -> None:
    """Writes ``results.csv``, ``results.json``, ``best.yaml`` and the page, each whole.

    Raises:
        EnvironmentProblemError: the directory cannot be written.
    """
    try:
        write_tables(files, results)
        write_best(files, results)
        write_page(files, results)
    except OSError as error:
        message = f"the results in `{files.root}` cannot be written: {error.strerror}"
        hint = f"what was trained is there: `fsdpq sweep {files.root}` writes them again"
        raise EnvironmentProblemError(message, hint=hint) from None


def _read_spec(files: SweepFiles) -> Mapping[str, Any]:
    """Returns the ``sweep.yaml`` of the directory: fsdpq wrote it, complete.

    Its recipes are not asked for: results outlive them.
    """
    try:
        content: Any = yaml.safe_load(files.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = f"`{files.spec}` cannot be read: {type(error).__name__}"
        raise UsageError(message, hint="name a directory that `fsdpq sweep` made") from None
    return cast("Mapping[str, Any]", content) if isinstance(content, dict) else {}
