"""Whether a sweep is good enough for CI: thresholds, and a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fsdpq.errors import ExitCode
from fsdpq.sweep.results.baseline import Comparison, Tolerances, compare_with_baseline
from fsdpq.sweep.results.conditions import Condition, describe_trial
from fsdpq.sweep.results.results import Results


@dataclass(frozen=True)
class Wanted:
    """What is asked of a sweep.

    Attributes:
        conditions: what must not be true of it.
        baseline: results that it must not be worse than, None for none.
        baseline_source: their file, as the user named it.
        tolerances: how much worse a measure may be.
    """

    conditions: tuple[Condition, ...] = ()
    baseline: Results | None = None
    baseline_source: str = ""
    tolerances: Tolerances = field(default_factory=Tolerances)


@dataclass(frozen=True)
class Check:
    """One thing that was asked.

    Attributes:
        name: ``eval_loss>2.1``, or ``baseline results.json``.
        broken: one line for everything that is wrong; empty where it passed.
    """

    name: str
    broken: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.broken


@dataclass(frozen=True)
class Verdict:
    """How a sweep stands against what was asked.

    Attributes:
        checks: in the order of the command line, the baseline last.
        comparison: with the baseline, None without one.
    """

    checks: tuple[Check, ...] = ()
    comparison: Comparison | None = None

    @property
    def passed(self) -> bool:
        """Whether all checks passed; also where nothing was asked."""
        return all(check.passed for check in self.checks)

    @property
    def exit_code(self) -> ExitCode:
        """What the process tells the shell, where nothing else went wrong."""
        return ExitCode.OK if self.passed else ExitCode.RUN_FAILED


def judge(results: Results, wanted: Wanted) -> Verdict:
    """Returns how ``results`` stand against what was asked.

    Trials that failed are not its business: the sweep's own exit code tells of them.
    """
    checks = [Check(c.text, tuple(c.broken_by(results))) for c in wanted.conditions]
    if wanted.baseline is None:
        return Verdict(tuple(checks))
    source = wanted.baseline_source
    comparison = compare_with_baseline(results, wanted.baseline, wanted.tolerances, source=source)
    checks.append(Check(f"baseline {source}", tuple(_list_broken(comparison, wanted.tolerances))))
    return Verdict(tuple(checks), comparison)


def _list_broken(comparison: Comparison, tolerances: Tolerances) -> Sequence[str]:
    lines = list(comparison.broken)
    for row in comparison.changed("worse"):
        old, new, change = row.texts
        allowed = f"{100 * tolerances.of(row.measure):g} %"
        values = f"{row.measure} was {old}, is {new}"
        by = f" ({change}, {allowed} allowed)" if change else ""
        lines.append(f"{describe_trial(row.trial)}: {values}{by}")
    return lines
