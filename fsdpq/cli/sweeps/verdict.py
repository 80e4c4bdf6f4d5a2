"""``--ci`` and the options around it, as a decorator of a verb.

What is asked is read before anything runs: a mistake in it, or a baseline that is not there, ends
the command at once, and a baseline is what it was even where the sweep writes the same file anew.
The verb ends with `fsdpq.cli.sweeps.conclusion`, which imports more than a start of ``fsdpq``
should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from fsdpq.sweep.results.verdict import Wanted

Function = TypeVar("Function", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class CiRequest:
    """What the options of `ci_options` say.

    Attributes:
        ci: plain lines, and the files for CI in the sweep directory.
        junit: file of JUnit's XML; None is ``junit.xml`` of the sweep with ``ci``, else none.
        summary: file of the Markdown; None is ``summary.md`` of the sweep with ``ci``, else none.
        wanted: what is asked of the sweep.
    """

    ci: bool
    junit: Path | None
    summary: Path | None
    wanted: Wanted


def ci_options(function: Function) -> Function:
    """Adds ``--ci`` and the options around it to a verb, which gets them as one ``ci``."""

    @functools.wraps(function)
    def with_request(
        *args: Any,
        ci: bool,
        junit: Path | None,
        summary: Path | None,
        fail_if: tuple[str, ...],
        baseline: Path | None,
        tolerance: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        wanted = _read_wanted(fail_if, baseline, tolerance)
        return function(*args, ci=CiRequest(ci, junit, summary, wanted), **kwargs)

    for option in reversed(_OPTIONS):
        option(with_request)
    return with_request  # pyright: ignore[reportReturnType]


def _read_wanted(
    fail_if: tuple[str, ...], baseline: Path | None, tolerance: tuple[str, ...]
) -> Wanted:
    from fsdpq.sweep.results.baseline import parse_tolerances, read_baseline
    from fsdpq.sweep.results.conditions import parse_condition
    from fsdpq.sweep.results.verdict import Wanted

    if tolerance and baseline is None:
        raise click.UsageError("--tolerance says how far from --baseline; there is none")
    return Wanted(
        conditions=tuple(map(parse_condition, fail_if)),
        baseline=None if baseline is None else read_baseline(baseline),
        baseline_source=str(baseline or ""),
        tolerances=parse_tolerances(tolerance),
    )


_OPTIONS = [
    click.option(
        "--ci", is_flag=True,
        help="For CI: plain lines, and junit.xml and summary.md in the sweep directory.",
    ),
    click.option("--junit", type=_PATH, help="Write trials and checks as JUnit XML to this file."),
    click.option("--summary", type=_PATH, help="Write the results as Markdown to this file."),
    click.option(
        "--fail-if", multiple=True, metavar="CONDITION",
        help="Exit 1 where it is true of a finished trial: 'eval_loss>2.1'; 'best.eval_loss>2.1' "
        "asks the best one alone. Repeatable.",
    ),
    click.option(
        "--baseline", type=_PATH,
        help="Exit 1 where a trial is worse than in this results.json of an earlier sweep.",
    ),
    click.option(
        "--tolerance", multiple=True, metavar="[MEASURE=]SHARE",
        help="How much worse it may be: 0.01 of the old value unless given; MEASURE=SHARE is for "
        "one measure. Repeatable.",
    ),
]  # fmt: skip
