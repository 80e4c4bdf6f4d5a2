"""What an import gives: a recipe as plain data, and what became of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fsdpq.errors import Location

Outcome = Literal[
    "converted",
    "default",
    "assumed",
    "refused",
    "built_in",
    "no_counterpart",
    "unusable",
    "dropped",
]

TITLES: dict[Outcome, str] = {
    "dropped": "not taken by {tool} itself",
    "unusable": "values that cannot be used",
    "no_counterpart": "no counterpart in fsdpq",
    "assumed": "carried over, not word for word: please check",
    "refused": "in the recipe, and refused by this version so far",
    "default": "defaults of {tool}, written out",
    "built_in": "nothing to write: fsdpq sees to it",
    "converted": "carried over",
}
"""Headings of the groups of findings, in the order in which a report shows them."""


@dataclass(frozen=True)
class Finding:
    """What became of one key of the source, or of one key of the recipe.

    Attributes:
        outcome: see `TITLES`.
        key: dotted key of the source; empty where a default or a check speaks of the recipe only.
        value: the value as it was written, shortened.
        target: dotted recipe keys that it went to, comma-separated.
        message: why, and what to do.
        location: where the key was written, None where it was written nowhere.
    """

    outcome: Outcome
    key: str
    value: str = ""
    target: str = ""
    message: str = ""
    location: Location | None = None


@dataclass(frozen=True)
class ImportResult:
    """A recipe and the account of its making.

    Attributes:
        tool: name of the source tool.
        source: the file as the user named it, or ``command line``.
        document: the recipe, valid by the schema.
        origins: recipe key -> the source's key that it came from.
        findings: every key of the source is in here, once or more.
    """

    tool: str
    source: str
    document: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict[str, str])
    findings: list[Finding] = field(default_factory=list[Finding])

    def of(self, *outcomes: Outcome) -> list[Finding]:
        """Returns the findings with one of ``outcomes``, in the order of the source."""
        return [finding for finding in self.findings if finding.outcome in outcomes]


def one_line(text: str) -> str:
    """Returns ``text`` without line breaks and other characters that cannot be printed."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
