"""Running the ranks of a training run to their end, with as many restarts as the recipe allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdpq.errors import FsdpqError, LaunchError, RunStoppedError
from fsdpq.launch.inputs.base_cache import remove_damaged_base
from fsdpq.launch.merge import merge_trained
from fsdpq.launch.nodes.first import First, RanksEndedElsewhereError
from fsdpq.launch.ranks.failure import (
    RanksEnd,
    count_oom_kills,
    explain_end,
    read_end,
    read_rank_errors,
)
from fsdpq.launch.ranks.keeper import RunKeeper, resume_hint
from fsdpq.launch.ranks.processes import RESUME_FLAG, TRUST_FLAG
from fsdpq.launch.ranks.restarts import clear_for_start, may_pass, name_way_back, restart_text
from fsdpq.launch.ranks.torchrun import Row, run_torchrun
from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.launch.screen import Screen
from fsdpq.launch.tracking.tracker import Tracker, tracked
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RankError


def run_ranks(
    files: RunFiles,
    recipe: Recipe,
    *,
    inputs: dict[str, Any],
    screen: Screen,
    worker: Sequence[str],
    resumes: bool = False,
    nodes: First | None = None,
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
        nodes: the other machines of the run, if any.

    Raises:
        RunStoppedError: a signal stopped them.
        FsdpqError: what the first of them to fail reports.
    """
    screen.open_run(files)
    if nodes is not None:
        nodes.share(files)
    with tracked(files, recipe, report=screen.report) as tracker:
        start = RanksStart(files, recipe, inputs, screen, worker, resumes, tracker)
        _run_with_restarts(start, nodes)
    if recipe.export.merge:
        merge_trained(files, recipe, screen=screen, trust_remote_code=TRUST_FLAG in worker)


def _run_with_restarts(start: RanksStart, nodes: First | None) -> None:
    files, limit = start.files, start.recipe.launch.max_restarts
    for number in range(limit + 1):
        clear_for_start(files)
        start = replace(start, resumes=start.resumes or number > 0)
        try:
            start.run(nodes)
        except FsdpqError as error:
            if number == limit or not may_pass(error, start.records(nodes)):
                name_way_back(files, error)
                _leave_report(files, start.screen)
                raise
            start.screen.report(restart_text(files, error, number=number + 1, limit=limit))
        else:
            break


def _leave_report(files: RunFiles, screen: Screen) -> None:
    """Writes the report of ranks that did not come to its phase; what ended them counts more."""
    from fsdpq.reports.report import write_report

    try:
        write_report(files)
    except (OSError, ValueError, TypeError, LookupError) as error:
        screen.report(f"note: no report: {error}")


@dataclass(frozen=True)
class RanksStart:
    """One start of the ranks.

    Attributes:
        files: the run directory.
        recipe: resolved.
        inputs: those of the lock.
        screen: shows what happens.
        worker: arguments of torchrun that name the worker.
        resumes: whether they go on from the newest checkpoint.
        tracker: looks at what they write.
    """

    files: RunFiles
    recipe: Recipe
    inputs: dict[str, Any]
    screen: Screen
    worker: Sequence[str]
    resumes: bool
    tracker: Tracker

    def run(self, nodes: First | None) -> None:
        """Runs the ranks to their end, those of other machines too.

        Raises:
            RunStoppedError: a signal stopped them.
            FsdpqError: what the first of them to fail reports.
        """
        files, launch = self.files, self.recipe.launch
        place = None if nodes is None else nodes.start(resumes=self.resumes)
        watch = HangWatch(files, int(launch.nproc_per_node), launch.hang_timeout_s)
        keeper = RunKeeper(files, watch, self.screen.report, others=nodes)
        progress = _Progress(self.screen, keeper, self.tracker)
        oom_kills = count_oom_kills()
        flags = [RESUME_FLAG] if self.resumes else []
        code: int | None = None
        stopped_by = ""
        at_once = True
        try:
            code, stopped_by = run_torchrun(
                files, launch, on_row=progress.take, worker=[*self.worker, *flags], keeper=keeper,
                place=place,
            )  # fmt: skip
            at_once = bool(stopped_by)
        except RanksEndedElsewhereError:
            code = None
        finally:
            self.screen.close()
            ends = [] if nodes is None else nodes.finish(at_once=at_once)
        if stopped_by:
            raise progress.stopped(stopped_by, files)
        if code == 0 and (stopped := keeper.stopped(progress.total_steps)) is not None:
            raise stopped
        if code != 0:
            own = read_end(files, exit_code=code, oom_kills_before=oom_kills)
            raise self._explain(own if nodes is None else nodes.own_end(own), ends)
        if not progress.done:
            message = "the ranks ended without a result"
            raise LaunchError(message, hint=f"the logs are in `{files.logs}`")

    def records(self, nodes: First | None) -> list[RankError]:
        """Returns the errors that ranks of all machines wrote."""
        elsewhere = [] if nodes is None else nodes.ends
        return [*read_rank_errors(self.files), *(r for end in elsewhere for r in end.records)]

    def _explain(self, own: RanksEnd, ends: Sequence[RanksEnd]) -> FsdpqError:
        is_mapped = self.recipe.fsdp.offload == "disk" and "base" in self.inputs
        mapped_base = Path(self.inputs["base"]["directory"]) if is_mapped else None
        error = explain_end(self.files, [own, *ends], mapped_base=mapped_base)
        remove_damaged_base(self.inputs, error, own.records)
        return error


class _Progress:
    """Passes rows on to the screen and remembers how far the run came."""

    def __init__(self, screen: Screen, keeper: RunKeeper, tracker: Tracker) -> None:
        self._screen = screen
        self._keeper = keeper
        self._tracker = tracker
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
        self._tracker.look()

    def stopped(self, signal_name: str, files: RunFiles) -> RunStoppedError:
        """Returns the one line for a run that was stopped."""
        after = f"after step {self._step} of {self.total_steps}" if self._step else "before step 1"
        message = f"stopped by {signal_name} {after}; its metrics and logs are in `{files.root}`"
        go_on = resume_hint(files)
        return RunStoppedError(f"{message}; {go_on}" if go_on else message)
