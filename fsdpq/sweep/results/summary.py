"""A sweep as Markdown, for the page of a CI job: verdict, leaderboard, what changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fsdpq.sweep.results.baseline import Compared, Comparison
from fsdpq.sweep.results.conditions import describe_trial
from fsdpq.sweep.results.leaderboard import build_columns, counts_line, list_troubles
from fsdpq.sweep.results.results import Results, TrialResult
from fsdpq.sweep.results.verdict import Verdict

MOST_ROWS = 50
"""GitHub refuses a summary of more than 1 MiB."""

MOST_LINES = 20

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def render_summary(results: Results, verdict: Verdict) -> str:
    """Returns the Markdown of a sweep; all that comes from recipes and runs is escaped.

    Args:
        results: of the sweep.
        verdict: on what was asked of it.
    """
    return "\n".join(_lines(results, verdict)) + "\n"


def _lines(results: Results, verdict: Verdict) -> Iterator[str]:
    failed = any(trial.status == "failed" for trial in results.trials) or not verdict.passed
    yield f"## Sweep {_escape(results.name)}: {'failed' if failed else 'passed'}"
    yield ""
    yield _escape(counts_line(results)) + (", smoke runs" if results.smoke else "")
    if verdict.checks:
        yield ""
        yield from _render_checks(verdict)
    if verdict.comparison is not None:
        yield from _render_comparison(verdict.comparison)
    yield from _render_table(results)
    yield from _render_troubles(results)


def _render_checks(verdict: Verdict) -> Iterator[str]:
    for check in verdict.checks:
        yield f"- **{'passed' if check.passed else 'failed'}** {_escape(check.name)}"
        for line in check.broken[:MOST_LINES]:
            yield f"  - {_escape(line)}"
        if len(check.broken) > MOST_LINES:
            yield f"  - and {len(check.broken) - MOST_LINES} more"


def _render_comparison(comparison: Comparison) -> Iterator[str]:
    changed = [*comparison.changed("worse"), *comparison.changed("better")]
    yield ""
    yield f"### Against {_escape(comparison.source)}"
    yield ""
    num_same = len(comparison.changed("same"))
    yield f"{len(comparison.rows)} values compared, {num_same} the same within the tolerance"
    if changed:
        yield from ("", *_table(("trial", "measure", "then", "now", "change", ""), []))
        yield from (_row(_changed_cells(row)) for row in changed[:MOST_ROWS])
        if len(changed) > MOST_ROWS:
            yield from ("", f"and {len(changed) - MOST_ROWS} more")
    lines = [*_named("not in this sweep", comparison.missing)]
    lines += [*_named("new", comparison.new), *map(_escape, comparison.notices)]
    if lines:
        yield ""
        yield from (f"- {line}" for line in lines)


def _changed_cells(row: Compared) -> tuple[str, ...]:
    worse = "**worse**" if row.change == "worse" else "better"
    return (*map(_escape, (describe_trial(row.trial), row.measure, *row.texts)), worse)


def _named(what: str, trials: Sequence[TrialResult]) -> Iterator[str]:
    if trials:
        names = ", ".join(_escape(describe_trial(trial)) for trial in trials[:MOST_LINES])
        more = f" and {len(trials) - MOST_LINES} more" if len(trials) > MOST_LINES else ""
        yield f"{what}: {names}{more}"


def _render_table(results: Results) -> Iterator[str]:
    columns = build_columns(results, most=MOST_ROWS)
    yield from ("", "### Trials", "")
    rights = [column.right for column in columns]
    yield from _table([_escape(column.title) for column in columns], rights)
    for cells in zip(*(column.cells for column in columns), strict=True):
        yield _row([_escape(cell) for cell in cells])
    if len(results.trials) > MOST_ROWS:
        yield from ("", f"and {len(results.trials) - MOST_ROWS} more in results.csv")


def _render_troubles(results: Results) -> Iterator[str]:
    troubles = list_troubles(results)
    if troubles:
        yield from ("", "### Without a rank", "")
    for trouble in troubles[:MOST_LINES]:
        first, *others = trouble.trials
        who = _escape(describe_trial(first)) + (f" and {len(others)} more" if others else "")
        yield f"- **{trouble.status}** {who}: {_escape(trouble.reason) or 'no reason known'}"
    if len(troubles) > MOST_LINES:
        yield f"- and {len(troubles) - MOST_LINES} more reasons in results.csv"


def _table(titles: Sequence[str], rights: Sequence[bool]) -> Iterator[str]:
    yield _row(titles)
    marks = ["---:" if right else "---" for right in rights] or ["---"] * len(titles)
    yield _row(marks)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """Returns ``text`` as Markdown shows it: on one line, without markup."""
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return _SPECIAL.sub(r"\\\1", shown)
