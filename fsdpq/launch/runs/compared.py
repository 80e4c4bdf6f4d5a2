"""Run directories for the page that compares them: found, read, told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.launch.runs.drift import LEVELS, Fact, list_facts
from fsdpq.launch.runs.status import read_status
from fsdpq.launch.runs.trained_run import NAME_A_RUN
from fsdpq.reports.comparison import ComparedRun
from fsdpq.reports.run_record import read_record
from fsdpq.run_files.paths import RunFiles

NOT_RECORDED = "not recorded"


def check_has_run(files: RunFiles) -> None:
    """Checks that a directory holds something of a run, finished or not.

    Raises:
        UsageError: it does not.
    """
    if not any(path.is_file() for path in (files.resolved, files.metrics, files.events)):
        raise UsageError(f"`{files.root}` is no run directory", hint=NAME_A_RUN)


def find_state(files: RunFiles) -> str:
    """Returns how a run stands now (`fsdpq.launch.runs.status.State`)."""
    return read_status(files, with_size=False).state


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Returns the runs of ``paths``, each with a label of its own: its directory's name, else path.

    Raises:
        UsageError: one of them is no run.
    """
    found: list[ComparedRun] = []
    names = Counter(path.absolute().name for path in paths)
    for path in paths:
        files = RunFiles(path)
        check_has_run(files)
        name = path.absolute().name
        label = name if names[name] == 1 else str(path)
        found.append(ComparedRun(label, str(path), read_record(files), find_state(files)))
    return found


def compare_environments(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Returns what differs between the locks of the runs, what matters most first.

    Returns:
        Rows of ``what``, ``level`` (`fsdpq.launch.runs.drift.Level`) and ``values``, one a run.
    """
    tables: list[dict[str, Fact]] = [dict(list_facts(run.record.environment)) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows: list[dict[str, Any]] = []
    for name in names:
        facts = [table.get(name) for table in tables]
        known = [fact for fact in facts if fact is not None]
        if any(fact.value != known[0].value for fact in known):
            values = [NOT_RECORDED if fact is None else fact.text for fact in facts]
            rows.append({"what": name, "level": known[0].level, "values": values})
    return sorted(rows, key=lambda row: LEVELS.index(row["level"]))
