"""What ``--fail-if`` says: a measure, a comparison and a number. Nothing is evaluated as code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fsdpq.errors import UsageError
from fsdpq.sweep.results.measures import explain_unknown, format_measure, is_known
from fsdpq.sweep.results.results import Results, TrialResult

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BEST = "best."

_CONDITION = re.compile(
    r"\s*(?P<measure>[^\s<>=!]+)\s*(?P<operator><=|>=|==|!=|<|>)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[KMGT]iB)?\s*"
)
_HINT = "write it as `eval_loss>2.1`, `best.eval_loss>2.1` or `peak_memory_bytes>20GiB`"


@dataclass(frozen=True)
class Condition:
    """What must not be true of a sweep.

    Attributes:
        text: as the user wrote it.
        measure: its name (`fsdpq.sweep.results.measures`).
        operator: a key of `OPERATORS`.
        number: what the measure is compared with.
        only_best: asked of the best trial alone, not of every finished one.
    """

    text: str
    measure: str
    operator: str
    number: float
    only_best: bool = False

    def broken_by(self, results: Results) -> Iterator[str]:
        """Yields one line for every trial that it is true of, or that lacks its measure.

        A sweep without a trial to ask breaks it too: nothing was shown.
        """
        asked = [trial for trial in results.trials if trial.finished]
        if self.only_best:
            asked = [results.best] if results.best else []
        if not asked:
            yield "there is no best trial" if self.only_best else "no trial finished"
        for trial in asked:
            value = trial.measures.get(self.measure)
            if value is None:
                yield f"{describe_trial(trial)} has no {self.measure}"
            elif OPERATORS[self.operator](value, self.number):
                shown = format_measure(self.measure, value)
                yield f"{describe_trial(trial)} has {self.measure} {shown}"


def parse_condition(text: str) -> Condition:
    """Returns the condition that ``text`` is.

    Raises:
        UsageError: it is none, or names no measure.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise UsageError(f"`{text}` is no condition", hint=_HINT)
    name = found["measure"]
    measure = name.removeprefix(BEST)
    check_measure(measure)
    number = float(found["number"]) * UNITS[found["unit"] or ""]
    if not math.isfinite(number):
        raise UsageError(f"the number of `{text}` is too large", hint=_HINT)
    return Condition(text.strip(), measure, found["operator"], number, name != measure)


def check_measure(name: str) -> None:
    """Refuses a name that no measure can have.

    Raises:
        UsageError: the measures that there are.
    """
    if not is_known(name):
        message, hint = explain_unknown(name)
        raise UsageError(message, hint=hint)


def describe_trial(trial: TrialResult) -> str:
    """Returns what messages call a trial: ``3f2a9c1e (adapter.rank=8)``."""
    return f"{trial.id} ({trial.label})" if trial.label else trial.id
