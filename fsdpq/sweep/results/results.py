"""What came of a sweep: one row a trial, the best first.

Rows are made of the trials and of the files that their runs left, so results can be collected at
any time, also while trials run. `Results.as_json` is the content of ``results.json``: what scripts
read, and what a later sweep is compared with (`fsdpq.sweep.results.verdict`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from fsdpq.errors import UsageError
from fsdpq.launch.runs.drift import NUMERIC_PACKAGES
from fsdpq.launch.runs.lock_file import as_list, as_mapping
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.sweep.outcome import Status, read_outcome
from fsdpq.sweep.results.measures import KNOWN, Direction, Measures, direction_of, read_measures
from fsdpq.sweep.trial import NOT_PART_OF_A_TRIAL, Trial

RESULTS_FORMAT = 1
"""Version of ``results.json``."""

ORDER: tuple[Status, ...] = (
    "finished", "hopeless", "interrupted", "running", "waiting", "failed", "skipped",
)  # fmt: skip
"""How rows follow each other; finished ones by the goal, the others as the sweep has them."""


@dataclass(frozen=True)
class Goal:
    """What makes one trial better than another.

    Attributes:
        measure: its name (`fsdpq.sweep.results.measures`).
        direction: which of two values is better; None is what is usual for the measure.
    """

    measure: str = "eval_loss"
    direction: Direction | None = None

    @property
    def better(self) -> Direction:
        """Which of two values is better."""
        return self.direction or direction_of(self.measure)

    def sort_key(self, value: float) -> float:
        """Orders values, the best first."""
        return value if self.better == "lower" else -value


@dataclass(frozen=True)
class TrialResult:
    """What came of one trial.

    Attributes:
        id: of the trial.
        label: what makes it differ, in one line.
        status: see `fsdpq.sweep.outcome`.
        reason: why it failed, was skipped or ended early, else empty.
        settings: what the sweep varies, dotted key -> value.
        overrides: the same in the words of the command line.
        measures: its numbers; what was not measured has no entry.
        rank: 1 for the best; None where it did not finish or lacks the goal's measure.
        recipe_sha256: of its complete recipe, wherever that lies; empty in results without one.
        source: the recipe's file, as the user named it; like the next, not in ``results.json``.
        base_dir: what relative paths of the recipe start from.
    """

    id: str
    label: str = ""
    status: Status = "waiting"
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    overrides: tuple[str, ...] = ()
    measures: Measures = field(default_factory=dict[str, float])
    rank: int | None = None
    recipe_sha256: str = ""
    source: Path = Path()
    base_dir: Path = Path()

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.status == "finished"


@dataclass(frozen=True)
class Results:
    """What came of a sweep.

    Attributes:
        name: of the sweep.
        goal: what its trials are ranked by.
        trials: ranked, the best first; those without a rank after them, in the order of `ORDER`.
        smoke: whether its recipes were only tried (``--smoke``).
        environment: versions and hardware of one of its runs, as its lock says them.
    """

    name: str
    goal: Goal
    trials: tuple[TrialResult, ...]
    smoke: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def best(self) -> TrialResult | None:
        """The trial that is ranked first."""
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.rank == 1 else None

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """Keys that the sweep varies, in its order."""
        return tuple(dict.fromkeys(key for trial in self.trials for key in trial.settings))

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """Those of them that have more than one value among its trials."""
        return tuple(key for key in self.settings if len(self._values(key)) > 1)

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """Measures that any trial has, the goal's first, those of tasks last."""
        found = {name for trial in self.trials for name in trial.measures}
        known = [name for name in KNOWN if name in found]
        order = [self.goal.measure, *known, *sorted(found.difference(known))]
        return tuple(dict.fromkeys(name for name in order if name in found))

    def counts(self) -> dict[Status, int]:
        """Returns how many trials have each status, in the order of `ORDER`; none with 0."""
        counted = Counter(trial.status for trial in self.trials)
        return {status: counted[status] for status in ORDER if status in counted}

    def as_json(self) -> dict[str, Any]:
        """Returns the content of ``results.json``."""
        names = [*KNOWN, *(name for name in self.measured if name not in KNOWN)]
        return {
            "format": RESULTS_FORMAT,
            "sweep": self.name,
            "smoke": self.smoke,
            "goal": {"measure": self.goal.measure, "direction": self.goal.better},
            "best": self.best.id if self.best else None,
            "environment": dict(self.environment),
            "trials": [_trial_fields(trial, names) for trial in self.trials],
        }

    def _values(self, key: str) -> set[str]:
        return {repr(trial.settings.get(key)) for trial in self.trials}


def collect_trials(
    files: SweepFiles, trials: Sequence[Trial], goal: Goal, *, smoke: bool = False
) -> list[TrialResult]:
    """Returns what came of each of ``trials`` so far, ranked (see `rank_trials`).

    Args:
        files: the sweep directory.
        trials: of the sweep, in its order.
        goal: what they are ranked by.
        smoke: whether they are smoke runs.
    """
    found: list[TrialResult] = []
    for trial in trials:
        outcome = read_outcome(files, trial.id)
        measures = dict[str, float]()
        if outcome.status != "skipped":
            measures = read_measures(files.run(trial.id), until=outcome.step)
        found.append(
            TrialResult(
                id=trial.id,
                label=trial.label,
                status=outcome.status,
                reason=outcome.reason,
                settings=trial.settings,
                overrides=trial.overrides,
                measures=measures,
                recipe_sha256=hash_recipe(trial.recipe, smoke=smoke),
                source=trial.source,
                base_dir=trial.base_dir,
            )
        )
    return rank_trials(found, goal)


def rank_trials(trials: Sequence[TrialResult], goal: Goal) -> list[TrialResult]:
    """Returns ``trials``, the best first and numbered; equal ones stay in their order.

    Only finished trials that have the goal's measure get a number. The other finished ones follow,
    then those that did not finish, in the order of `ORDER`.
    """
    ranked = [t for t in trials if t.finished and goal.measure in t.measures]
    ranked.sort(key=lambda trial: goal.sort_key(trial.measures[goal.measure]))
    others = [t for t in trials if not (t.finished and goal.measure in t.measures)]
    others.sort(key=lambda trial: ORDER.index(trial.status))
    numbered = [replace(trial, rank=number) for number, trial in enumerate(ranked, start=1)]
    return [*numbered, *(replace(trial, rank=None) for trial in others)]


def hash_recipe(recipe: Recipe, *, smoke: bool) -> str:
    """Returns a hash of what a trial trains that does not depend on where its recipe lies.

    Args:
        recipe: complete.
        smoke: whether it is only tried.
    """
    values = recipe.model_dump(mode="json", exclude=set(NOT_PART_OF_A_TRIAL))
    return hashlib.sha256(json.dumps([values, smoke], sort_keys=True).encode()).hexdigest()


def read_environment(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Returns versions and hardware of the first of ``runs`` that has a lock, empty without one."""
    for files in runs:
        try:
            lock = as_mapping(json.loads(files.lock.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        packages = as_mapping(lock.get("packages"))
        computing = {name: packages[name] for name in packages if name in NUMERIC_PACKAGES}
        kept = {name: lock[name] for name in ("fsdpq", "python", "platform") if name in lock}
        return {**kept, "packages": computing, "hardware": dict(as_mapping(lock.get("hardware")))}
    return {}


def parse_results(content: Any, *, source: str) -> Results:
    """Returns the results that ``content``, of a ``results.json``, holds.

    Args:
        content: plain JSON data.
        source: what messages call it.

    Raises:
        UsageError: it is something else, or of a later version.
    """
    fields = as_mapping(content)
    version = fields.get("format")
    if not isinstance(version, int) or not isinstance(fields.get("trials"), list):
        hint = "name a `results.json` that `fsdpq sweep` wrote"
        raise UsageError(f"`{source}` holds no results of a sweep", hint=hint)
    if version > RESULTS_FORMAT:
        message = f"`{source}` is in format {version}; this fsdpq reads {RESULTS_FORMAT}"
        raise UsageError(message, hint="make it again with this version, or install a later one")
    goal = as_mapping(fields.get("goal"))
    direction = goal.get("direction")
    return Results(
        name=str(fields.get("sweep", "")),
        goal=Goal(
            str(goal.get("measure", "eval_loss")),
            cast("Direction", direction) if direction in get_args(Direction) else None,
        ),
        trials=tuple(_parse_trial(as_mapping(row)) for row in as_list(fields["trials"])),
        smoke=fields.get("smoke") is True,
        environment=as_mapping(fields.get("environment")),
    )


def _trial_fields(trial: TrialResult, names: Sequence[str]) -> dict[str, Any]:
    return {
        "rank": trial.rank,
        "id": trial.id,
        "label": trial.label,
        "status": trial.status,
        "reason": trial.reason,
        "settings": dict(trial.settings),
        "overrides": list(trial.overrides),
        "measures": {name: trial.measures.get(name) for name in names},
        "recipe_sha256": trial.recipe_sha256,
    }


def _parse_trial(fields: Mapping[str, Any]) -> TrialResult:
    status, rank = fields.get("status"), fields.get("rank")
    measures = as_mapping(fields.get("measures"))
    return TrialResult(
        id=str(fields.get("id", "")),
        label=str(fields.get("label", "")),
        status=cast("Status", status) if status in get_args(Status) else "waiting",
        reason=str(fields.get("reason", "")),
        settings=as_mapping(fields.get("settings")),
        overrides=tuple(str(text) for text in as_list(fields.get("overrides"))),
        measures={n: v for n, v in measures.items() if isinstance(v, int | float)},
        rank=rank if isinstance(rank, int) else None,
        recipe_sha256=str(fields.get("recipe_sha256") or ""),
    )
