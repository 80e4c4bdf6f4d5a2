"""Running the ranks of a training run to their end, with as many restarts as the recipe allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdpq.errors import FsdpqError, LaunchError, RunStoppedError
from fsdpq.launch.inputs.base_cache import remove_damaged_base
from fsdpq.launch.merge import merge_trained
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.keeper import RunKeeper, resume_hint
from fsdpq.launch.ranks.processes import RESUME_FLAG, TRUST_FLAG
from fsdpq.launch.ranks.restarts import clear_for_start, may_pass, name_way_back, restart_text
from fsdpq.launch.ranks.torchrun import Row, run_torchrun
from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.launch.screen import Screen
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles


def run_ranks(
    files: RunFiles,
    recipe: Recipe,
    *,
    inputs: dict[str, Any],
    screen: Screen,
    worker: Sequence[str],
    resumes: bool = False,
) -> None:
    """Runs the ranks of a training run to their end.

    Ranks that fail are started again, ``launch.max_restarts`` times at most, where that may help.

    Args:
        files: the run directory.
        recipe: resolved.
        inputs: those of the lock.
        screen: shows what happens.
        worker: arguments of torchrun that name the worker.
        resumes: whether they go on from the newest checkpoint.

    Raises:
        RunStoppedError: a signal stopped them.
        FsdpqError: what the first of them to fail reports.
    """
    screen.open_run(files)
    limit = recipe.launch.max_restarts
    for number in range(limit + 1):
        clear_for_start(files)
        flags = [RESUME_FLAG] if resumes or number else []
        try:
            start_ranks(files, recipe, inputs=inputs, screen=screen, worker=[*worker, *flags])
        except FsdpqError as error:
            if number == limit or not may_pass(files, error):
                name_way_back(files, error)
                _leave_report(files, screen)
                raise
            screen.report(restart_text(files, error, number=number + 1, limit=limit))
        else:
            break
    if recipe.export.merge:
        merge_trained(files, recipe, screen=screen, trust_remote_code=TRUST_FLAG in worker)


def _leave_report(files: RunFiles, screen: Screen) -> None:
    """Writes the report of ranks that did not come to its phase; what ended them counts more."""
    from fsdpq.reports.report import write_report

    try:
        write_report(files)
    except (OSError, ValueError, TypeError, LookupError) as error:
        screen.report(f"note: no report: {error}")


def start_ranks(
    files: RunFiles,
    recipe: Recipe,
    *,
    inputs: dict[str, Any],
    screen: Screen,
    worker: Sequence[str],
) -> None:
    """Starts the ranks once; see `run_ranks`."""
    num_ranks, limit_s = int(recipe.launch.nproc_per_node), recipe.launch.hang_timeout_s
    keeper = RunKeeper(files, HangWatch(files, num_ranks, limit_s), screen.report)
    progress = _Progress(screen, keeper)
    oom_kills = count_oom_kills()
    try:
        code, stopped_by = run_torchrun(
            files, recipe.launch, on_row=progress.take, worker=worker, keeper=keeper
        )
    finally:
        screen.close()
    if stopped_by:
        raise progress.stopped(stopped_by, files)
    if code == 0 and (stopped := keeper.stopped(progress.total_steps)) is not None:
        raise stopped
    if code != 0:
        is_mapped = recipe.fsdp.offload == "disk" and "base" in inputs
        error = explain_failure(
            files,
            exit_code=code,
            oom_kills_before=oom_kills,
            mapped_base=Path(inputs["base"]["directory"]) if is_mapped else None,
        )
        remove_damaged_base(files, inputs, error)
        raise error
    if not progress.done:
        message = "the ranks ended without a result"
        raise LaunchError(message, hint=f"the logs are in `{files.logs}`")


class _Progress:
    """Passes rows on to the screen and remembers how far the run came."""

    def __init__(self, screen: Screen, keeper: RunKeeper) -> None:
        self._screen = screen
        self._keeper = keeper
        self._step = 0
        self.total_steps: int | None = None
        self.done = False

    def take(self, row: Row) -> None:
        """Takes one row of metrics or events."""
        if row.get("event") == "step":
            self._step, self.total_steps = row["step"], row.get("total_steps")
        if row.get("event") == "setup":
            self.total_steps = row["total_steps"]
        self.done = self.done or row.get("event") == "done"
        self._keeper.take(row)
        self._screen.show_row(row)

    def stopped(self, signal_name: str, files: RunFiles) -> RunStoppedError:
        """Returns the one line for a run that was stopped."""
        after = f"after step {self._step} of {self.total_steps}" if self._step else "before step 1"
        message = f"stopped by {signal_name} {after}; its metrics and logs are in `{files.root}`"
        go_on = resume_hint(files)
        return RunStoppedError(f"{message}; {go_on}" if go_on else message)
