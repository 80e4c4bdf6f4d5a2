"""The end of a sweep on the command line: its verdict in words, and the files that CI reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from fsdpq.cli.options import say
from fsdpq.cli.render import clean, render_notice, render_table
from fsdpq.cli.sweeps.verdict import CiRequest
from fsdpq.errors import EnvironmentProblemError
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.results.baseline import Comparison
from fsdpq.sweep.results.conditions import describe_trial
from fsdpq.sweep.results.junit import render_junit
from fsdpq.sweep.results.results import Results
from fsdpq.sweep.results.summary import render_summary
from fsdpq.sweep.results.verdict import Verdict, judge

MOST_LINES = 20


def conclude(files: SweepFiles, results: Results, request: CiRequest) -> Verdict:
    """Judges a sweep, says what is wrong on stderr, and writes the files for CI.

    On GitHub's runners, broken checks and failed trials become annotations, and the Markdown goes
    to the page of the job too.

    Args:
        files: the sweep directory.
        results: of the sweep.
        request: what the user asked for.

    Raises:
        EnvironmentProblemError: a file cannot be written.
    """
    verdict = judge(results, request.wanted)
    for line in render_verdict(verdict):
        say(click.unstyle(line) if request.ci else line)
    junit = request.junit or (files.junit if request.ci else None)
    summary = request.summary or (files.summary if request.ci else None)
    if junit is not None:
        _write(junit, render_junit(files, results, verdict))
    text = render_summary(results, verdict)
    if summary is not None:
        _write(summary, text.encode())
    if request.ci and os.environ.get("GITHUB_ACTIONS") == "true":
        for line in _annotations(results, verdict):
            say(line)
        if page := os.environ.get("GITHUB_STEP_SUMMARY"):
            _write(Path(page), text.encode(), append=True)
    return verdict


def render_verdict(verdict: Verdict) -> Iterator[str]:
    """Yields the lines that tell how each check ended, and what changed since the baseline."""
    for check in verdict.checks:
        word, color = ("passed", "green") if check.passed else ("failed", "red")
        yield click.style(word, fg=color, bold=True) + f"  {clean(check.name)}"
        if verdict.comparison is None or check is not verdict.checks[-1]:
            yield from _cut([f"  {clean(line)}" for line in check.broken])
    if verdict.comparison is not None:
        yield from _render_comparison(verdict.comparison)


def _render_comparison(comparison: Comparison) -> Iterator[str]:
    changed = [*comparison.changed("worse"), *comparison.changed("better")]
    yield from (f"  {clean(line)}" for line in comparison.broken)
    rows = [
        (row.change, clean(describe_trial(row.trial)), row.measure, *row.texts) for row in changed
    ]
    if rows:
        titles = ("", "trial", "measure", "then", "now", "change")
        yield from _cut(list(render_table([titles, *rows], indent="  ")))
    num_same = len(comparison.changed("same"))
    yield f"  {len(comparison.rows)} values compared, {num_same} the same within the tolerance"
    for what, trials in (("not in this sweep", comparison.missing), ("new", comparison.new)):
        yield from _cut([f"  {what}: {clean(describe_trial(trial))}" for trial in trials])
    yield from map(render_notice, comparison.notices)


def _cut(lines: list[str]) -> Iterator[str]:
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"  and {len(lines) - MOST_LINES} more"


def _write(path: Path, content: bytes, *, append: bool = False) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            with path.open("ab") as file:
                file.write(content)
        else:
            write_whole(path, content)
    except OSError as error:
        raise EnvironmentProblemError(f"`{path}` cannot be written: {error.strerror}") from None


def _annotations(results: Results, verdict: Verdict) -> Iterator[str]:
    """Yields commands of GitHub's runner: an error for each failed trial and each broken check.

    https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
    """
    failed = [trial for trial in results.trials if trial.status == "failed"]
    for trial in failed[:MOST_LINES]:
        yield _annotation(f"trial {describe_trial(trial)} failed", trial.reason)
    for check in verdict.checks:
        if not check.passed:
            yield _annotation(f"{check.name} failed", "\n".join(check.broken[:MOST_LINES]))


def _annotation(title: str, message: str) -> str:
    def escape(text: str) -> str:
        text = clean(text, keep="\n")
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    head = escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::error title={head}::{escape(message)}"
