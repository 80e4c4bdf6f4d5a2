"""The campaign as tables: by configuration, and by who was hit in which phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chaos.blows import Blow, Struck

PHASES = ("start", "data", "load", "eval", "train", "export", "report")


@dataclass(frozen=True)
class Outcome:
    """One disturbed run, compared.

    Attributes:
        configuration: its name.
        struck: the blows that fell.
        commands: commands that it took to its end.
        largest: largest difference of a loss to that of the undisturbed run.
        problems: what should not be; none for a good run.
    """

    configuration: str
    struck: tuple[Struck, ...]
    commands: int
    largest: float
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data, for the campaign's log."""
        return asdict(self)

    @classmethod
    def of_json(cls, row: dict[str, Any]) -> Outcome:
        """Returns what `as_json` wrote."""
        struck = [Struck(**{**each, "blow": Blow(**each["blow"])}) for each in row["struck"]]
        return cls(**{**row, "struck": tuple(struck), "problems": tuple(row["problems"])})


def render(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yields both tables as Markdown."""
    yield from _by_configuration(outcomes)
    yield ""
    yield from _by_phase([struck for outcome in outcomes for struck in outcome.struck])


def _by_configuration(outcomes: Sequence[Outcome]) -> Iterator[str]:
    head = [
        "configuration", "runs", "kills", "of these during a write", "saving signals", "resumes",
        "largest difference", "as undisturbed",
    ]  # fmt: skip
    yield from _lines([head, ["---", *["---:"] * (len(head) - 1)]])
    names = list(dict.fromkeys(outcome.configuration for outcome in outcomes))
    rows = [_row(name, [o for o in outcomes if o.configuration == name]) for name in names]
    yield from _lines([*rows, _row("all", outcomes)])


def _row(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    blows = [struck for outcome in outcomes for struck in outcome.struck]
    kills = [struck for struck in blows if struck.blow.kind.startswith("SIGKILL")]
    good = sum(not outcome.problems for outcome in outcomes)
    largest = max((outcome.largest for outcome in outcomes), default=0.0)
    return [
        name,
        str(len(outcomes)),
        str(len(kills)),
        str(sum(struck.writing for struck in kills)),
        str(len(blows) - len(kills)),
        str(sum(outcome.commands - 1 for outcome in outcomes)),
        "0" if largest == 0.0 else f"{largest:.1e}",
        f"{good} of {len(outcomes)}",
    ]


def _lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _by_phase(blows: Sequence[Struck]) -> Iterator[str]:
    counts = Counter((struck.blow.kind, struck.phase) for struck in blows)
    yield from _lines([["who was hit", *PHASES, "all"], ["---", *["---:"] * (len(PHASES) + 1)]])
    for kind in sorted({kind for kind, _ in counts}):
        numbers = [counts[kind, phase] for phase in PHASES]
        yield from _lines([[kind, *(str(number or "") for number in numbers), str(sum(numbers))]])
