"""Runs the checks one after another and tells the launcher about each.

A rank that raises says so to the others over a group of its own, so that a collective which it left
half way does not get in the way. Where ranks wait for each other without end, as on cards whose
peer-to-peer copies hang, a watchdog writes down which check it was and ends the rank.
"""

from __future__ import annotations

import datetime
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh

from fsdpq import dist
from fsdpq.errors import ExitCode
from fsdpq.run_files.rows import CheckResult
from fsdpq.run_files.writing import append_json_line
from fsdpq.worker.guard import end_process
from fsdpq.worker.self_test import (
    byte_checks,
    collective_checks,
    model_check,
    offload_checks,
    quantizer_checks,
    speed_check,
)
from fsdpq.worker.self_test.check import Bench, Check, CheckFailedError, CheckSkippedError

CHECKS: tuple[Check, ...] = (
    *collective_checks.CHECKS,
    *byte_checks.CHECKS,
    *offload_checks.CHECKS,
    *quantizer_checks.CHECKS,
    *model_check.CHECKS,
)

QUICK_NAMES = ("all-reduce", "gather", "bnb nf4, double")
QUICK_CHECKS: tuple[Check, ...] = (
    *(check for check in CHECKS if check.name in QUICK_NAMES),
    *speed_check.CHECKS,
)
"""What ``fsdpq doctor`` runs by itself: a collective, a gather, the default quantizer."""

LIMIT_S = 60.0
"""A check takes a second at most; the first on a GPU also starts its libraries."""

SPEAK_LATER_S = 2.0
"""A rank that knows more than that it waits speaks first."""

HUNG_REMEDY = (
    "on GPUs try `NCCL_P2P_DISABLE=1` in the environment (peer-to-peer copies of some cards hang)"
)
GROUP_TIMEOUT = datetime.timedelta(seconds=4 * LIMIT_S)


def run_self_test(events: Path, device_type: str, checks: Sequence[Check]) -> None:
    """Runs every check, whatever the ones before it found, and appends their rows.

    Ranks: all (collective).

    Args:
        events: JSON lines: one ``checks`` with all names, then one `CheckResult` a check.
        device_type: ``cuda`` or ``cpu``.
        checks: what to run.
    """
    device = dist.start_process_group(device_type)
    bench = Bench(device, init_device_mesh(device_type, (dist.world_size(),)))
    verdicts: Any = torch_dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    names = [(check.group, check.name) for check in checks]
    if dist.rank() == 0:
        append_json_line(events, {"event": "checks", "names": names, "time": time.time()})
    watchdog = Watchdog(lambda result: append_json_line(events, result.row()))
    for check in checks:
        with watchdog.over(check):
            own = run_check(check, bench)
            watchdog.found(own)
            every = gather_results(own, verdicts)
        if dist.rank() == 0:
            append_json_line(events, combine_results(every).row())
    dist.wait_for_all()


def run_check(check: Check, bench: Bench) -> CheckResult:
    """Returns how one check ended on this rank; no exception of it gets out."""
    started = time.monotonic()
    try:
        status, detail = "passed", check.run(bench)
    except CheckFailedError as error:
        status, detail = "failed", str(error)
    except CheckSkippedError as error:
        status, detail = "skipped", str(error)
    except Exception as error:
        sys.stderr.write(traceback.format_exc())
        first_line = (str(error).strip().splitlines() or [""])[0]
        status, detail = "failed", f"raised {type(error).__name__}: {first_line}"
    remedy = check.remedy if status == "failed" else ""
    seconds = time.monotonic() - started
    return CheckResult(check.group, check.name, status, detail, remedy, seconds)


def gather_results(own: CheckResult, group: torch_dist.ProcessGroup) -> list[CheckResult]:
    """Returns the results of all ranks, in order. Ranks: all (collective)."""
    every: list[CheckResult | None] = [None] * dist.world_size()
    torch_dist.all_gather_object(every, own, group=group)
    return [result for result in every if result is not None]


def combine_results(every: Sequence[CheckResult]) -> CheckResult:
    """Returns the first failure of any rank, naming the ranks; else what rank 0 says."""
    failed = [number for number, result in enumerate(every) if result.status == "failed"]
    if not failed:
        return every[0]
    result = every[failed[0]]
    if len(every) == 1:
        return result
    who = "all ranks" if len(failed) == len(every) else f"rank {', '.join(map(str, failed))}"
    return result.with_detail(f"{who}: {result.detail}")


class Watchdog:
    """Ends this rank when a check takes too long, after writing down which one it was.

    Args:
        write: takes the failure.
        limit_s: time that a check gets.
    """

    def __init__(self, write: Callable[[CheckResult], None], limit_s: float = LIMIT_S) -> None:
        self._write = write
        self._limit_s = limit_s
        self._check: Check | None = None
        self._own: CheckResult | None = None
        self._timer: threading.Timer | None = None

    def over(self, check: Check) -> Watchdog:
        """Returns itself, to be entered for the time of ``check``."""
        self._check, self._own = check, None
        return self

    def found(self, own: CheckResult) -> None:
        """Notes how this rank ended the check; the others may still be waiting."""
        self._own = own

    def __enter__(self) -> None:
        self._timer = threading.Timer(self._limit_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        check, own = self._check, self._own
        if check is None:
            return
        if own is None or own.status != "failed":
            time.sleep(SPEAK_LATER_S)
            text = f"rank {dist.rank()} waited {self._limit_s:.0f} s for the other ranks"
            own = CheckResult(check.group, check.name, "failed", text, HUNG_REMEDY, self._limit_s)
        else:
            own = own.with_detail(f"rank {dist.rank()}: {own.detail}")
        self._write(own)
        end_process(ExitCode.ENVIRONMENT)
