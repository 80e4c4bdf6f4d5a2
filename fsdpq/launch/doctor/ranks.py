"""Ranks that talk to each other and quantize: the shortest part of the self-test, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fsdpq.errors import FsdpqError, RunStoppedError
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor.packages import installed_version
from fsdpq.launch.machine.gpus import GpuFacts
from fsdpq.launch.self_test import WORKER, SelfTest, choose_ranks, run_self_test
from fsdpq.run_files.rows import CheckResult

STATUSES = {"passed": OK, "skipped": WARN, "failed": FAIL}


def find_ranks(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Starts one rank per GPU, or two on the CPU, and lets them add up, gather and quantize."""
    if installed_version("torch") is None or installed_version("bitsandbytes") is None:
        return  # `find_packages` says so
    ranks = choose_ranks(None, None, num_gpus=len(gpus))
    try:
        test = run_self_test(
            ranks, on_names=lambda _names: None, on_result=lambda _result: None,
            worker=(*WORKER, "--quick"),
        )  # fmt: skip
    except RunStoppedError:
        raise
    except FsdpqError as error:
        place = "on GPUs" if ranks.device == "cuda" else "on the CPU"
        value = f"{ranks.count} rank{'s' * (ranks.count > 1)} {place}: {error.message}"
        remedy = error.hint or "read the output of the ranks: `fsdpq doctor --self-test`"
        yield Finding("ranks", "start", FAIL, value, remedy)
        return
    yield from explain_test(test)


def explain_test(test: SelfTest) -> Iterator[Finding]:
    """Yields a finding for each check."""
    for result in test.results:
        remedy = "" if STATUSES[result.status] == OK else result.remedy or result.detail
        yield Finding("ranks", _name(result), STATUSES[result.status], result.detail, remedy)


def _name(result: CheckResult) -> str:
    """Returns a name that is unique: one quantizer is checked in several ways."""
    kind = result.group.split()[0]
    return result.name if kind in ("collectives", "bytes") else f"{result.name}: {kind}"
