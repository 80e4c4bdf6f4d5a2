"""The trials as a table of texts: what the terminal, Markdown and the page show alike.

Only columns that say something: settings that have several values, the goal, and measures that
differ. Why trials have no rank is said beside the table (`list_troubles`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fsdpq.sweep.outcome import Status
from fsdpq.sweep.results.measures import format_measure
from fsdpq.sweep.results.results import Results, TrialResult
from fsdpq.sweep.results.written import plain_text

SHOWN = (
    "eval_loss",
    "best_eval_loss",
    "train_loss",
    "tokens_per_s",
    "train_s",
    "peak_memory_bytes",
)
"""Measures that the table has beside the goal and those of tasks, in this order."""

Sort = Literal["rank", "id", "status", "setting", "measure"]


@dataclass(frozen=True)
class Column:
    """One column, a cell a trial.

    Attributes:
        sort: what it holds.
        key: its setting or measure; else the same as its title.
        title: heading.
        cells: texts, in the order of `Results.trials`.
    """

    sort: Sort
    key: str
    title: str
    cells: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether its texts are aligned at their end, as numbers are."""
        return self.sort in ("rank", "measure")


@dataclass(frozen=True)
class Trouble:
    """Trials that have no rank for the same reason.

    Attributes:
        status: of them.
        reason: one line, may be empty.
        trials: in the order of the results.
    """

    status: Status
    reason: str
    trials: tuple[TrialResult, ...]


def build_columns(results: Results, *, most: int | None = None) -> list[Column]:
    """Returns the columns of the leaderboard.

    Args:
        results: of the sweep.
        most: only the first so many trials; None is all.
    """
    trials = results.trials[:most]
    ranks = ("" if trial.rank is None else str(trial.rank) for trial in trials)
    columns = [Column("rank", "rank", "#", tuple(ranks))]
    columns.append(Column("id", "trial", "trial", tuple(trial.id for trial in trials)))
    if any(not trial.finished for trial in results.trials):
        columns.append(Column("status", "status", "status", tuple(t.status for t in trials)))
    titles = short_titles(results.varied)
    for key in results.varied:
        cells = tuple(setting_text(trial.settings.get(key)) for trial in trials)
        columns.append(Column("setting", key, titles[key], cells))
    for name in _shown_measures(results):
        cells = tuple(_cell(name, trial) for trial in trials)
        columns.append(Column("measure", name, name.removeprefix("tasks."), cells))
    return columns


def list_troubles(results: Results) -> list[Trouble]:
    """Returns why trials have no rank, those with one reason together; waiting ones left out."""
    groups: dict[tuple[Status, str], list[TrialResult]] = {}
    for trial in results.trials:
        reason = trial.reason
        if trial.finished and trial.rank is None:
            reason = f"it has no {results.goal.measure}"
        if trial.rank is None and trial.status not in ("waiting", "running"):
            groups.setdefault((trial.status, reason), []).append(trial)
    return [Trouble(status, reason, tuple(group)) for (status, reason), group in groups.items()]


def short_titles(keys: Sequence[str]) -> dict[str, str]:
    """Returns a title for each dotted key: as few of its last parts as tell it from the others."""
    return {key: _shortest(key, [other for other in keys if other != key]) for key in keys}


def setting_text(value: Any) -> str:
    """Returns a setting for people: ``2.5e-4``, four digits of a number that has more."""
    if isinstance(value, float):
        text = f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
        mantissa, letter, exponent = text.partition("e")
        if "." in mantissa and letter:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}" if letter else mantissa
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain_text(value))


def counts_line(results: Results) -> str:
    """Returns ``12 trials: 10 finished, 1 failed, 1 skipped``."""
    total = len(results.trials)
    counted = ", ".join(f"{count} {status}" for status, count in results.counts().items())
    return f"{total} trial{'' if total == 1 else 's'}" + (f": {counted}" if counted else "")


def _shown_measures(results: Results) -> Iterator[str]:
    """Yields the goal's measure, and of the others those that differ between trials."""
    last = [_cell("eval_loss", trial) for trial in results.trials]
    for name in results.measured:
        cells = [_cell(name, trial) for trial in results.trials]
        wanted = name in SHOWN or name.startswith("tasks.")
        repeats = name == "best_eval_loss" and cells == last
        if name == results.goal.measure or (wanted and len(set(cells)) > 1 and not repeats):
            yield name


def _cell(measure: str, trial: TrialResult) -> str:
    return format_measure(measure, trial.measures.get(measure))


def _shortest(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        title = ".".join(parts[-count:])
        if not any(other == title or other.endswith(f".{title}") for other in others):
            return title
    return key
