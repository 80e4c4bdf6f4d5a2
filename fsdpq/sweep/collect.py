"""The results of a sweep directory, collected from what its trials left, and written there."""

from __future__ import annotations

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.frozen import read_frozen
from fsdpq.sweep.options import GoalOptions
from fsdpq.sweep.results import Goal, Results, collect_trials, read_environment
from fsdpq.sweep.spec import read_spec
from fsdpq.sweep.written import write_best, write_tables


def collect_results(files: SweepFiles) -> Results:
    """Returns what came of the sweep in a directory so far.

    Args:
        files: the sweep directory.

    Raises:
        UsageError, RecipeError, CheckpointError: it holds no sweep that can be read.
    """
    loaded = read_spec(files.spec)
    goal, smoke = goal_of(loaded.spec.goal), loaded.spec.smoke
    trials = read_frozen(files)
    return Results(
        loaded.name, goal, tuple(collect_trials(files, trials, goal, smoke=smoke)), smoke,
        read_environment([files.run(trial.id) for trial in trials]),
    )  # fmt: skip


def goal_of(options: GoalOptions) -> Goal:
    """Returns the goal that a sweep's spec names."""
    if options.direction == "auto":
        return Goal(options.measure)
    return Goal(options.measure, "lower" if options.direction == "minimize" else "higher")


def write_results(files: SweepFiles, results: Results) -> None:
    """Writes the tables and the best recipe.

    Raises:
        OSError: the directory cannot be written.
    """
    write_tables(files, results)
    write_best(files, results)
