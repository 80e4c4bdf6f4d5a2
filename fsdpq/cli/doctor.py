"""``fsdpq doctor``: can this machine train, and does what it computes come out right."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.render import clean, wants_color
from fsdpq.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from fsdpq.launch.doctor import Finding
    from fsdpq.launch.self_test import Ranks, SelfTest
    from fsdpq.run_files.rows import CheckResult

_COLORS = {
    "ok": "green", "passed": "green", "warn": "yellow", "skipped": "yellow",
    "fail": "red", "failed": "red",
}  # fmt: skip
_STATUS_WIDTH = len("skipped")


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Look only: try neither devices, ranks nor the disk.")
@click.option(
    "--self-test", is_flag=True,
    help="Run checks on the device: bytes of shards, quantizers, gradients, collectives.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]),
    help="Of the self-test; default: the GPUs where there are any.",
)  # fmt: skip
@click.option(
    "--nproc", type=click.IntRange(min=1),
    help="Ranks of the self-test; default: one per GPU, or two on the CPU.",
)  # fmt: skip
@json_option
def doctor_command(
    *, quick: bool, self_test: bool, device: str | None, nproc: int | None, as_json: bool
) -> None:
    """Look at this machine and try it: packages, GPUs, host, network, disks, ranks.

    Takes about 15 seconds, with --quick one. With --self-test the checks of what ranks compute
    run, all of them and nothing else. Exits with 4 where training cannot work, or a check fails.
    """
    if self_test and quick:
        raise UsageError("`--quick` leaves out what `--self-test` is", hint="give one of them")
    if self_test:
        _run_self_test(device, nproc, as_json=as_json)
    elif device is not None or nproc is not None:
        given = "--device" if device is not None else "--nproc"
        raise UsageError(f"`{given}` is for the self-test", hint="add `--self-test`")
    else:
        _examine(quick=quick, as_json=as_json)


def _examine(*, quick: bool, as_json: bool) -> None:
    from fsdpq.launch.doctor import FAIL, examine

    if not quick:
        click.echo("trying devices, ranks and the disk too (`--quick` does not)", err=True)
    findings = examine(quick=quick)
    ok = all(finding.status != FAIL for finding in findings)
    if as_json:
        echo_json({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        _echo(render_findings(findings))
    if not ok:
        sys.exit(ExitCode.ENVIRONMENT)


def render_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yields the findings under their subjects, and a summary."""
    subject, width = "", 0
    for finding in findings:
        if finding.subject != subject:
            yield from [""] * bool(subject)
            subject = finding.subject
            width = max(len(other.name) for other in findings if other.subject == subject)
            yield click.style(subject, bold=True)
        inline = f": {finding.remedy}" if finding.remedy and finding.status == "ok" else ""
        yield _line(finding.status, finding.name, finding.value + inline, width)
        if finding.remedy and not inline:
            yield _remedy(finding.remedy, width)
    yield ""
    failed = sum(finding.status == "fail" for finding in findings)
    yield (
        f"training cannot work here: {failed} of {len(findings)} findings failed"
        if failed
        else "training can work here; `fsdpq doctor --self-test` checks all that ranks compute"
    )


def _run_self_test(device: str | None, nproc: int | None, *, as_json: bool) -> None:
    from fsdpq.launch.self_test import choose_ranks, run_self_test

    ranks = choose_ranks(device, nproc)
    if as_json:
        test = run_self_test(ranks, on_names=lambda _names: None, on_result=lambda _result: None)
        echo_json(self_test_fields(test))
    else:
        click.echo(f"starting {_ranks_text(ranks)}", err=True)
        screen = SelfTestScreen()
        test = run_self_test(ranks, on_names=screen.take_names, on_result=screen.show)
        _echo(render_summary(test))
    if not test.ok:
        sys.exit(ExitCode.ENVIRONMENT)


class SelfTestScreen:
    """Prints every result as it comes, under the heading of its group."""

    def __init__(self) -> None:
        self._width = 0
        self._group = ""

    def take_names(self, names: Sequence[tuple[str, str]]) -> None:
        """Makes the column of names wide enough for all."""
        self._width = max(len(name) for _, name in names)

    def show(self, result: CheckResult) -> None:
        """Prints one result."""
        _echo(self.lines(result))

    def lines(self, result: CheckResult) -> Iterator[str]:
        """Yields the lines of one result."""
        if result.group != self._group:
            yield from [""] * bool(self._group)
            self._group = result.group
            yield click.style(clean(result.group), bold=True)
        yield _line(result.status, result.name, result.detail, self._width)
        if result.remedy:
            yield _remedy(result.remedy, self._width)


def render_summary(test: SelfTest) -> Iterator[str]:
    """Yields how many checks passed, and where the logs are if some did not."""
    yield ""
    counts = [f"{test.count(status)} {status}" for status in ("passed", "failed", "skipped")]
    yield f"{', '.join(counts)}, on {_ranks_text(test.ranks)}"
    if test.logs is not None:
        yield f"the logs of the ranks are in {test.logs}"


def self_test_fields(test: SelfTest) -> dict[str, Any]:
    """Returns the results as plain data."""
    return {
        "ok": test.ok,
        "device": test.ranks.device,
        "num_ranks": test.ranks.count,
        "logs": None if test.logs is None else str(test.logs),
        "checks": [asdict(result) for result in test.results],
    }


def _ranks_text(ranks: Ranks) -> str:
    place = "the CPU" if ranks.device == "cpu" else "one GPU" if ranks.count == 1 else "GPUs"
    return f"{ranks.count} rank{'s' * (ranks.count > 1)} on {place}"


def _line(status: str, name: str, text: str, width: int) -> str:
    mark = click.style(status.ljust(_STATUS_WIDTH), fg=_COLORS[status])
    return f"  {mark}  {clean(name).ljust(width)}  {clean(text)}"


def _remedy(remedy: str, width: int) -> str:
    indent = " " * (2 + _STATUS_WIDTH + 2 + width + 2)
    return f"{indent}{click.style('do:', fg='cyan', bold=True)} {clean(remedy)}"


def _echo(lines: Iterator[str]) -> None:
    for line in lines:
        click.echo(line, color=wants_color(sys.stdout))
