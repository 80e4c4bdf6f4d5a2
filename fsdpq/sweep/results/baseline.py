"""A sweep beside an earlier one: which trials got worse, by more than is allowed.

A trial is compared with the one of the same id, or of the same recipe in another directory (a
checkout of a CI machine). Where there is none, because a key that the sweep does not vary has
another value or fsdpq got a new option, trials are compared by what the sweep varies, as long as
that names one trial on each side; how many are is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fsdpq.errors import UsageError
from fsdpq.launch.runs.drift import compare_locks
from fsdpq.sweep.results.conditions import check_measure, describe_trial
from fsdpq.sweep.results.measures import AMOUNTS, TASKS, TIMINGS, direction_of, format_measure
from fsdpq.sweep.results.results import Goal, Results, TrialResult, parse_results

DEFAULT_TOLERANCE = 0.01
"""Share of the old value. Losses move in the fourth digit when torch or a kernel changes."""

MAX_BYTES = 256 << 20
"""The results of 10,000 trials are a tenth of this."""

Change = Literal["worse", "better", "same"]


@dataclass(frozen=True)
class Tolerances:
    """How much worse a measure may get, as a share of its old value.

    Attributes:
        usual: of measures that ``by_measure`` does not name.
        by_measure: name -> share; timings are compared only where they are named here.
    """

    usual: float = DEFAULT_TOLERANCE
    by_measure: Mapping[str, float] = field(default_factory=dict[str, float])

    def of(self, measure: str) -> float:
        """Returns the share for one measure."""
        return self.by_measure.get(measure, self.usual)


@dataclass(frozen=True)
class Compared:
    """One measure of one trial, then and now.

    Attributes:
        trial: as it is now.
        measure: name.
        old: value in the baseline.
        new: value now, None where it was not measured.
        change: ``same`` is within the tolerance.
    """

    trial: TrialResult
    measure: str
    old: float
    new: float | None
    change: Change

    @property
    def share(self) -> float | None:
        """The difference as a share of the old value; None where there is none."""
        return None if self.new is None or self.old == 0 else (self.new - self.old) / abs(self.old)

    @property
    def texts(self) -> tuple[str, str, str]:
        """Old value, new value and difference for people."""
        new = "none" if self.new is None else format_measure(self.measure, self.new)
        change = "" if self.share is None else f"{100 * self.share:+.2f} %"
        return format_measure(self.measure, self.old), new, change


@dataclass(frozen=True)
class Comparison:
    """A sweep beside its baseline.

    Attributes:
        source: file of the baseline, as the user named it.
        rows: every measure that was compared, in the order of the results.
        broken: what is wrong beside measures that got worse: one line each.
        missing: trials of the baseline that the sweep does not have.
        new: trials that the baseline does not have.
        num_by_settings: trials that were matched by settings, not by id.
        notices: what the reader should know.
    """

    source: str
    rows: tuple[Compared, ...] = ()
    broken: tuple[str, ...] = ()
    missing: tuple[TrialResult, ...] = ()
    new: tuple[TrialResult, ...] = ()
    num_by_settings: int = 0
    notices: tuple[str, ...] = ()

    def changed(self, change: Change) -> list[Compared]:
        """Returns the rows of one kind of change."""
        return [row for row in self.rows if row.change == change]

    @property
    def passed(self) -> bool:
        """Whether nothing got worse."""
        return not self.broken and not self.changed("worse")


def read_baseline(path: Path) -> Results:
    """Returns the results in a ``results.json``.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    hint = "name a `results.json` that `fsdpq sweep` wrote"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"the baseline `{path}` cannot be read: {error.strerror}"
        raise UsageError(message, hint=hint) from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"the baseline `{path}` is larger than {MAX_BYTES >> 20} MiB", hint=hint)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the baseline `{path}` is no JSON ({error})", hint=hint) from None
    return parse_results(content, source=str(path))


def parse_tolerances(texts: Sequence[str]) -> Tolerances:
    """Returns what several ``--tolerance`` say: ``0.02`` for all, ``eval_loss=0.05`` for one.

    Raises:
        UsageError: a text is neither.
    """
    usual, by_measure = DEFAULT_TOLERANCE, dict[str, float]()
    for text in texts:
        name, equals, number = text.rpartition("=")
        if equals:
            check_measure(name)
            by_measure[name] = _share(number, text)
        else:
            usual = _share(number, text)
    return Tolerances(usual, by_measure)


def compare_with_baseline(
    now: Results, then: Results, tolerances: Tolerances, *, source: str
) -> Comparison:
    """Returns what changed since ``then``.

    Compared are the goal's measure, ``eval_loss``, those of tasks, and what ``tolerances`` name;
    timings only where they are named. Amounts (``steps``) are worse in either direction.

    Args:
        now: of the sweep.
        then: of the baseline.
        tolerances: how much worse a measure may get.
        source: file of the baseline, for messages.
    """
    if now.smoke != then.smoke:
        kinds = ("real runs", "smoke runs")
        line = f"it holds {kinds[then.smoke]}, and these are {kinds[now.smoke]}"
        return Comparison(source, broken=(line,))
    pairs, num_by_settings = _match(now, then)
    rows: list[Compared] = []
    broken: list[str] = []
    for old, new in pairs:
        if old.finished and not new.finished:
            broken.append(f"{describe_trial(new)} finished then and is {new.status} now")
        elif old.finished:
            rows += _compare_trial(old, new, now.goal, tolerances)
    matched_then, matched_now = {id(old) for old, _ in pairs}, {id(new) for _, new in pairs}
    missing = tuple(t for t in then.trials if id(t) not in matched_then and t.finished)
    added = tuple(t for t in now.trials if id(t) not in matched_now)
    if not rows and not broken:
        broken.append(_nothing_compared(now, then, pairs))
    notices = tuple(_notices(now, then, tolerances, num_by_settings))
    return Comparison(source, tuple(rows), tuple(broken), missing, added, num_by_settings, notices)


def _share(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        hint = "write a share: `0.02` for all measures, `eval_loss=0.02` for one"
        raise UsageError(f"`{whole}` is no tolerance", hint=hint)
    return value


def _match(now: Results, then: Results) -> tuple[list[tuple[TrialResult, TrialResult]], int]:
    """Returns pairs of the same trial, in the order of ``now``, and how many are by settings."""
    found: dict[str, TrialResult] = {}  # id of the trial now -> as it was then
    num_before = 0
    for key_of in (_id_key, _recipe_key, _settings_key):
        num_before = len(found)
        used = {id(trial) for trial in found.values()}
        old = _by_key((trial for trial in then.trials if id(trial) not in used), key_of)
        new = _by_key((trial for trial in now.trials if trial.id not in found), key_of)
        for key, trials in new.items():
            if len(trials) == len(old.get(key, ())) == 1:
                found[trials[0].id] = old[key][0]
    pairs = [(found[trial.id], trial) for trial in now.trials if trial.id in found]
    return pairs, len(found) - num_before


def _by_key(
    trials: Iterator[TrialResult], key_of: Callable[[TrialResult], str]
) -> dict[str, list[TrialResult]]:
    found: dict[str, list[TrialResult]] = {}
    for trial in trials:
        if key := key_of(trial):
            found.setdefault(key, []).append(trial)
    return found


def _id_key(trial: TrialResult) -> str:
    return trial.id


def _recipe_key(trial: TrialResult) -> str:
    return trial.recipe_sha256


def _settings_key(trial: TrialResult) -> str:
    return json.dumps(dict(trial.settings), sort_keys=True, default=str)


def _compare_trial(
    old: TrialResult, new: TrialResult, goal: Goal, tolerances: Tolerances
) -> Iterator[Compared]:
    for name in _compared_measures(old, goal, tolerances):
        before, after = old.measures[name], new.measures.get(name)
        lower = (goal.better if name == goal.measure else direction_of(name)) == "lower"
        if after is None:
            change = "worse"
        elif abs(after - before) <= tolerances.of(name) * abs(before) * (1 + 1e-9):
            change = "same"
        elif name in AMOUNTS:
            change = "worse"
        else:
            change = "better" if (after < before) == lower else "worse"
        yield Compared(new, name, before, after, change)


def _compared_measures(old: TrialResult, goal: Goal, tolerances: Tolerances) -> list[str]:
    usual = [goal.measure, "eval_loss", *sorted(n for n in old.measures if n.startswith(TASKS))]
    wanted = dict.fromkeys([*usual, *tolerances.by_measure])
    asked = set(wanted).difference(TIMINGS).union(tolerances.by_measure)
    return [name for name in wanted if name in asked and name in old.measures]


def _nothing_compared(
    now: Results, then: Results, pairs: Sequence[tuple[TrialResult, TrialResult]]
) -> str:
    if not any(trial.finished for trial in then.trials):
        return "no trial of it finished"
    if not pairs:
        return "it has none of these trials, neither by id nor by settings"
    return f"it has no measure to compare; name one, as `--tolerance {now.goal.measure}=0.1`"


def _notices(
    now: Results, then: Results, tolerances: Tolerances, num_by_settings: int
) -> Iterator[str]:
    if num_by_settings:
        count = f"{num_by_settings} trial{'' if num_by_settings == 1 else 's'}"
        yield f"{count} compared by settings: the rest of the recipe, or fsdpq, is not what it was"
    goal = now.goal.measure
    if goal in TIMINGS and goal not in tolerances.by_measure:
        yield f"{goal} is not compared without a `--tolerance {goal}=SHARE` of its own"
    for drift in compare_locks(then.environment, now.environment).at("numbers"):
        yield f"{drift.what} was {drift.then}, is {drift.now}"
