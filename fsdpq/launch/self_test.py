"""The flow of ``fsdpq doctor --self-test``: ranks on the user's device, one result a check."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fsdpq.errors import (
    EnvironmentProblemError,
    ExitCode,
    FsdpqError,
    LaunchError,
    RunStoppedError,
    UsageError,
)
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.torchrun import Row, run_torchrun
from fsdpq.recipe.sections.launch import LaunchOptions
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import CheckResult

WORKER = ("-m", "fsdpq.worker", "self-test")
CPU_RANKS = 2
NOT_RUN_REMEDY = "first mend what ended the ranks, then run the self-test again"


@dataclass(frozen=True)
class Ranks:
    """Where the self-test runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        count: number of ranks.
    """

    device: str
    count: int


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        ranks: where it ran.
        results: one for each check, also for those that the ranks did not come to.
        logs: of the ranks, kept where something failed; else None.
    """

    ranks: Ranks
    results: tuple[CheckResult, ...]
    logs: Path | None

    def count(self, status: str) -> int:
        """Returns how many checks ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.count("failed") == 0


def choose_ranks(device: str | None, count: int | None, *, num_gpus: int | None = None) -> Ranks:
    """Returns device and number of ranks: all GPUs, or two ranks where there is none.

    Args:
        device: as the user gave it; None is ``cuda`` where there is a GPU.
        count: as the user gave it.
        num_gpus: of this machine; None counts them.

    Raises:
        EnvironmentProblemError: GPUs are asked for and there is none.
        UsageError: more ranks than GPUs.
    """
    if device == "cpu":
        return Ranks("cpu", count or CPU_RANKS)
    num_gpus = len(list_gpus()) if num_gpus is None else num_gpus
    if num_gpus == 0 and device == "cuda":
        message = "`--device cuda`: this machine shows no GPU"
        raise EnvironmentProblemError(message, hint="`nvidia-smi -L` must list it; or test the CPU")
    if num_gpus == 0:
        return Ranks("cpu", count or CPU_RANKS)
    if count is not None and count > num_gpus:
        message = f"`--nproc {count}`: this machine has {num_gpus} GPU{'s' * (num_gpus > 1)}"
        raise UsageError(message, hint=f"use `--nproc {num_gpus}`, or `--device cpu`")
    return Ranks("cuda", count or num_gpus)


def run_self_test(
    ranks: Ranks,
    *,
    on_names: Callable[[Sequence[tuple[str, str]]], None],
    on_result: Callable[[CheckResult], None],
    worker: Sequence[str] = WORKER,
) -> SelfTest:
    """Runs the self-test to its end and returns all results.

    Args:
        ranks: where it runs.
        on_names: told group and name of all checks before the first one.
        on_result: told each result as it comes.
        worker: arguments of torchrun that name the worker; device and directory follow.

    Raises:
        FsdpqError: the ranks could not start.
        RunStoppedError: a signal ended it.
    """
    files = RunFiles(Path(tempfile.mkdtemp(prefix="fsdpq-self-test-")))
    files.logs.mkdir()
    progress = _Progress(on_names, on_result)
    oom_kills = count_oom_kills()
    launch = LaunchOptions.model_validate({"device": ranks.device, "nproc_per_node": ranks.count})
    keep = False
    try:
        code, stopped_by = run_torchrun(
            files, launch, on_row=progress.take, worker=(*worker, f"--device={ranks.device}")
        )
        if stopped_by:
            raise RunStoppedError(f"stopped by {stopped_by}")
        if code != 0 or not progress.names:
            keep = True
            progress.end_early(_reason(files, code, oom_kills))
        results = tuple(progress.results)
        keep = any(result.status == "failed" for result in results)
        return SelfTest(ranks, results, files.logs if keep else None)
    finally:
        if not keep:
            shutil.rmtree(files.root, ignore_errors=True)


def _reason(files: RunFiles, code: int, oom_kills: dict[str, int]) -> FsdpqError:
    if code == 0:
        return LaunchError("the ranks ended without a result", hint=f"see `{files.logs}`")
    return explain_failure(files, exit_code=code, oom_kills_before=oom_kills)


class _Progress:
    """Takes the worker's rows."""

    def __init__(
        self,
        on_names: Callable[[Sequence[tuple[str, str]]], None],
        on_result: Callable[[CheckResult], None],
    ) -> None:
        self._on_names = on_names
        self._on_result = on_result
        self.names: list[tuple[str, str]] = []
        self.results: list[CheckResult] = []

    def take(self, row: Row) -> None:
        """Takes one row of events.jsonl; of several results of one check the first one counts."""
        if row["event"] == "checks":
            self.names = [(group, name) for group, name in row["names"]]
            self._on_names(self.names)
        elif row["event"] == "check":
            self._add(CheckResult(**{f.name: row[f.name] for f in fields(CheckResult)}))

    def end_early(self, reason: FsdpqError) -> None:
        """Fails the checks that did not run; raises ``reason`` where none of them did."""
        if not self.names:
            reason.exit_code = ExitCode.ENVIRONMENT
            raise reason
        known = {(result.group, result.name) for result in self.results}
        why = f"did not run: {reason.message}"
        if self.results and self.results[-1].status == "failed":
            why = f"did not run: the ranks ended at `{self.results[-1].name}`"
        for group, name in self.names:
            if (group, name) not in known:
                self._add(CheckResult(group, name, "failed", why, NOT_RUN_REMEDY, 0.0))

    def _add(self, result: CheckResult) -> None:
        if (result.group, result.name) not in {(r.group, r.name) for r in self.results}:
            self.results.append(result)
            self._on_result(result)
