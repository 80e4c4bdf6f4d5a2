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
from fsdpq.launch.resolve import resolve_launch
from fsdpq.launch.run_dir import check_run_dir, create_run_dir
from fsdpq.launch.torchrun import WORKER, Row, check_endpoint, run_torchrun
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.root import Recipe
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
    worker: Sequence[str] = WORKER,
) -> RunFiles:
    """Trains the recipe and returns its run directory.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    loaded = load_recipe(recipe_path, overrides)
    if run_dir is not None:
        check_run_dir(run_dir)
    gpus = list_gpus()
    recipe = resolve_launch(loaded.recipe, num_gpus=len(gpus))
    if recipe.launch.device == "cuda":
        check_bf16(told_dtype(recipe), gpus)
    check_endpoint(recipe.launch)
    inputs = fetch_inputs(loaded, screen=screen)
    lock = describe_run(loaded, recipe, gpus=gpus, inputs=inputs)
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


def fetch_inputs(loaded: LoadedRecipe, *, screen: Screen) -> dict[str, Any]:
    """Fetches the base model and the data, and returns where they are as plain JSON data.

    Raises:
        FetchError, UsageError: one of them cannot be had.
    """
    from fsdpq.fetch.resolve import fetch_data, fetch_model

    recipe: Recipe = loaded.recipe
    # The data first: its mistakes are cheap to find, a model takes long to download.
    data = fetch_data(
        recipe.data.path, recipe.data.dataset, base_dir=loaded.base_dir, report=screen.report
    )
    model = fetch_model(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        base_dir=loaded.base_dir,
        report=screen.report,
    )
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
