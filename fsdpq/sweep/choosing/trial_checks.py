"""Checking what only a sweep asks of its recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.root import Recipe
from fsdpq.sweep.choosing.options import MedianStoppingOptions, OptunaOptions
from fsdpq.sweep.choosing.spec import LoadedSpec
from fsdpq.sweep.results.measures import OF_HELD_OUT_ROWS, TASKS
from fsdpq.sweep.trial import Trial


def check_trials(loaded: LoadedSpec, trials: Sequence[Trial]) -> None:
    """Checks what only a sweep asks of its recipes.

    Raises:
        RecipeError: with all Problems.
    """
    problems = list(_problems_of(loaded, trials))
    if problems:
        raise RecipeError(problems)


def _problems_of(loaded: LoadedSpec, trials: Sequence[Trial]) -> Iterator[Problem]:
    recipes = [trial.recipe for trial in trials]
    stops_early = isinstance(loaded.spec.early_stopping, MedianStoppingOptions)
    if stops_early and any(recipe.training.eval_interval is None for recipe in recipes):
        message = "`early_stopping` compares held-out losses on the way, and there are none"
        yield Problem(message, "early_stopping", hint="set `training.eval_interval`")
    yield from _check_measured(loaded, recipes)
    at_once = loaded.spec.parallel != 1
    if at_once and any(recipe.launch.rdzv_endpoint is not None for recipe in recipes):
        message = "trials that run at the same time cannot share `launch.rdzv_endpoint`"
        yield Problem(message, "launch.rdzv_endpoint", hint="delete it: a free port is found")
    submits = any(recipe.launch.scheduler == "slurm" for recipe in recipes)
    if submits and loaded.spec.scheduler == "local":
        message = "`launch.scheduler: slurm` would submit every trial by itself"
        hint = "`--scheduler slurm` submits them as one array, `launch.scheduler=local` runs them"
        yield Problem(message, "launch.scheduler", hint=hint)
    if loaded.spec.scheduler == "slurm" and isinstance(loaded.spec.strategy, OptunaOptions):
        message = "Optuna chooses a trial by what others came to, so they cannot be one array"
        yield Problem(message, "strategy.kind", hint="use `random`, or run the sweep inside a job")
    if any(recipe.launch.nnodes != 1 for recipe in recipes):
        message = "a trial runs on one machine, and `launch.nnodes` asks for more"
        yield Problem(message, "launch.nnodes", hint="set `launch.nnodes=1`")


def _check_measured(loaded: LoadedSpec, recipes: Sequence[Recipe]) -> Iterator[Problem]:
    """Yields a Problem where no trial will measure the goal, so none would be the best."""
    measure = loaded.spec.goal.measure
    if loaded.spec.smoke or not recipes:
        return
    if measure in OF_HELD_OUT_ROWS and not any(_holds_out(recipe) for recipe in recipes):
        message = f"the goal `{measure}` is of held-out rows, and no recipe has any"
        hint = "set `data.eval_fraction=0.1`, or rank by another: `--goal train_loss`"
        yield Problem(message, "goal.measure", hint=hint)
    if measure.startswith(TASKS) and not any(recipe.evaluation.tasks for recipe in recipes):
        message = f"the goal `{measure}` is of a task, and no recipe has `evaluation.tasks`"
        yield Problem(message, "goal.measure", hint="name the task in `evaluation.tasks`")


def _holds_out(recipe: Recipe) -> bool:
    return recipe.data.eval is not None or recipe.data.eval_fraction > 0
