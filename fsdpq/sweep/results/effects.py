"""What each setting did to the goal: the trials that share a value, together.

A sweep of several settings mixes their effects, so this is a place to look first and no proof: it
says how well the trials with a value did, at best and in the middle.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.sweep.results.leaderboard import setting_text
from fsdpq.sweep.results.results import Results, TrialResult

MOST_VALUES = 12
"""A setting of words with more values is left out: a value has too few trials to say anything."""

MOST_NUMBERS, NUM_RANGES = 6, 3
"""Numbers with more values are told in so many ranges of equally many trials."""


@dataclass(frozen=True)
class Effect:
    """How the trials that share a value did.

    Attributes:
        value: of the setting, or a range of values.
        num_trials: that have it and are ranked.
        best: their best value of the goal's measure.
        median: the middle of them.
        is_best: no other value of the setting has a better median.
    """

    value: str
    num_trials: int
    best: float
    median: float
    is_best: bool


def list_effects(results: Results) -> dict[str, list[Effect]]:
    """Returns setting -> its values, for those settings that have several among ranked trials."""
    ranked = [trial for trial in results.trials if trial.rank is not None]
    found = {key: list(_effects(results, ranked, key)) for key in results.varied}
    return {key: effects for key, effects in found.items() if len(effects) > 1}


def _effects(results: Results, ranked: Sequence[TrialResult], key: str) -> Iterator[Effect]:
    goal = results.goal
    groups = _group(ranked, key)
    values = {
        name: sorted((trial.measures[goal.measure] for trial in trials), key=goal.sort_key)
        for name, trials in groups.items()
    }
    medians = {name: statistics.median(found) for name, found in values.items()}
    best = min(medians.values(), key=goal.sort_key, default=None)
    for name, found in values.items():
        yield Effect(name, len(found), found[0], medians[name], medians[name] == best)


def _group(trials: Sequence[TrialResult], key: str) -> dict[str, list[TrialResult]]:
    """Returns the trials by their value, numbers in order; many numbers in ranges."""
    numeric = all(_is_number(trial.settings.get(key)) for trial in trials)
    ordered = sorted(trials, key=lambda trial: trial.settings[key]) if numeric else trials
    groups: dict[str, list[TrialResult]] = {}
    for trial in ordered:
        groups.setdefault(setting_text(trial.settings.get(key)) or "none", []).append(trial)
    if not numeric:
        return groups if len(groups) <= MOST_VALUES else {}
    if len(groups) <= MOST_NUMBERS:
        return groups
    ends = [round(part * len(ordered) / NUM_RANGES) for part in range(NUM_RANGES + 1)]
    ranges: dict[str, list[TrialResult]] = {}
    for start, end in itertools.pairwise(ends):
        part = ordered[start:end]
        low, high = (setting_text(trial.settings[key]) for trial in (part[0], part[-1]))
        ranges.setdefault(f"{low} to {high}", []).extend(part)
    return ranges


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
