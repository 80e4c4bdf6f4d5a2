"""The flow of ``fsdpq train``: everything between a command line and a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fsdpq.errors import LaunchError, RunStoppedError
from fsdpq.launch.devices import check_bf16, list_gpus
from fsdpq.launch.failure import count_oom_kills, explain_failure
from fsdpq.launch.lock_file import describe_run
from fsdpq.launch.processes import TRUST_FLAG
from fsdpq.launch.resolve import resolve_launch
from fsdpq.launch.run_dir import check_run_dir, create_run_dir
from fsdpq.launch.shrink import shrink_recipe
from fsdpq.launch.torchrun import WORKER, Row, check_endpoint, run_torchrun
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.registry import check_packages
from fsdpq.run_files import RunFiles


class Screen(Protocol):
    """What shows a run to the user."""

    def report(self, message: str) -> None:
        """Shows one line about the preparations."""
        ...

    def open_run(self, files: RunFiles) -> None:
        """Shows that the ranks are about to start."""
        ...

    def show_row(self, row: Row) -> None:
        """Shows one row of metrics or events."""
        ...

    def close(self) -> None:
        """Leaves the terminal as it was."""
        ...


def train(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    screen: Screen,
    smoke: bool = False,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
) -> RunFiles:
    """Trains the recipe and returns its run directory.

    Args:
        recipe_path: the recipe's file.
        overrides: from the command line.
        run_dir: a new directory; None takes one in ``runs/``.
        screen: shows what happens.
        smoke: train a few steps of a tiny random model of the same family instead, on the CPU.
        trust_remote_code: let the ranks run Python code that the model brings. It goes to the
            ranks as an argument, so neither a recipe nor a run directory can ask for it.
        worker: arguments of torchrun that name the worker.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    loaded = load_recipe(recipe_path, overrides)
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    if run_dir is not None:
        check_run_dir(run_dir)
    gpus = [] if smoke else list_gpus()
    wanted = shrink(loaded, screen=screen) if smoke else loaded.recipe
    recipe = resolve_launch(wanted, num_gpus=len(gpus))
    check_packages(recipe)
    if recipe.launch.device == "cuda":
        check_bf16(told_dtype(recipe), gpus)
    check_endpoint(recipe.launch)
    if smoke:
        inputs = make_inputs(loaded, screen=screen)
    else:
        inputs = fetch_inputs(loaded, screen=screen, trust_remote_code=trust_remote_code)
    lock = describe_run(
        loaded, recipe, gpus=gpus, inputs=inputs, trust_remote_code=trust_remote_code
    )
    worker = (*worker, TRUST_FLAG) if trust_remote_code else worker
    files = create_run_dir(recipe, raw=loaded.raw, lock=lock, run_dir=run_dir)
    screen.open_run(files)
    progress = _Progress(screen)
    oom_kills = count_oom_kills()
    try:
        code, stopped_by = run_torchrun(files, recipe.launch, on_row=progress.take, worker=worker)
    finally:
        screen.close()
    if stopped_by:
        raise progress.stopped(stopped_by, files)
    if code != 0:
        raise explain_failure(files, exit_code=code, oom_kills_before=oom_kills)
    if not progress.done:
        message = "the ranks ended without a result"
        raise LaunchError(message, hint=f"the logs are in `{files.logs}`")
    return files


def fetch_inputs(
    loaded: LoadedRecipe, *, screen: Screen, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Fetches the base model and the data, and returns where they are as plain JSON data.

    Raises:
        FetchError, UsageError: one of them cannot be had.
        RecipeError: the data has bad rows.
    """
    from fsdpq.fetch.data import fetch_data
    from fsdpq.fetch.resolve import fetch_model

    recipe: Recipe = loaded.recipe
    # The data first: its mistakes are cheap to find, a model takes long to download.
    data = fetch_data(recipe.data, base_dir=loaded.base_dir, report=screen.report)
    model = fetch_model(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        base_dir=loaded.base_dir,
        report=screen.report,
        with_code=trust_remote_code,
    )
    return {"model": _plain(asdict(model)), "data": _plain(asdict(data))}


def shrink(loaded: LoadedRecipe, *, screen: Screen) -> Recipe:
    """Returns the recipe of a smoke run; says what could not stay as it is."""
    shrunk = shrink_recipe(loaded.recipe)
    for line in shrunk.replaced:
        screen.report(f"smoke: {line}")
    return shrunk.recipe


def make_inputs(loaded: LoadedRecipe, *, screen: Screen) -> dict[str, Any]:
    """Makes a tiny random model and rows for a smoke run; see `fetch_inputs`.

    Raises:
        UsageError: the architecture of the recipe's model is not known.
    """
    from fsdpq.launch.smoke import make_smoke_model, make_smoke_rows

    model = make_smoke_model(loaded.recipe, base_dir=loaded.base_dir, report=screen.report)
    data = make_smoke_rows(loaded.recipe.data, report=screen.report)
    return {"model": _plain(asdict(model)), "data": _plain(asdict(data))}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in fields.items()
    }


class _Progress:
    """Passes rows on to the screen and remembers how far the run came."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._step = 0
        self._total_steps: int | None = None
        self.done = False

    def take(self, row: Row) -> None:
        """Takes one row of metrics or events."""
        if row.get("event") == "step":
            self._step, self._total_steps = row["step"], row.get("total_steps")
        self.done = self.done or row.get("event") == "done"
        self._screen.show_row(row)

    def stopped(self, signal_name: str, files: RunFiles) -> RunStoppedError:
        """Returns the one line for a run that was stopped."""
        after = f"after step {self._step} of {self._total_steps}" if self._step else "before step 1"
        message = f"stopped by {signal_name} {after}; its metrics and logs are in `{files.root}`"
        return RunStoppedError(message)
