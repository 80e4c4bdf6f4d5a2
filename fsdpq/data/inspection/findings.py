"""Findings: what is wrong or unusual, how often, and in which rows it was seen first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 5
"""Rows that are named for each finding."""

MAX_GROUPS = 40
"""Different texts of one kind; more than these are counted together."""

KINDS = (
    "bad_row", "unrenderable", "over_limit", "cut", "too_long", "untrained", "empty", "roles",
    "duplicate", "held_out_duplicate", "special_tokens", "unknown_tokens",
)  # fmt: skip
"""In the order in which they are shown."""

ERRORS = ("bad_row", "unrenderable", "over_limit")
"""Kinds that end a run."""

SKIPPED = ("bad_row", "unrenderable")
"""Those that ``data.on_bad_row: skip`` leaves out instead."""

OTHERS = "other mistakes"
_NUMBER = re.compile(r"\d+")
_MAX_TEXT = 300


@dataclass(frozen=True)
class Place:
    """Where a row is.

    Attributes:
        source: index of its source.
        file: its file's path.
        row: its 1-based number among the rows of its source.
        line: the line where it begins, 0 where its file has none.
    """

    source: int
    file: str
    row: int
    line: int = 0


@dataclass
class Finding:
    """One kind of finding in one wording."""

    kind: str
    text: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


class Findings:
    """Collects findings; memory does not grow with their number."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}
        self._groups: dict[str, int] = {}

    def add(self, kind: str, text: str, place: Place, *, detail: str = "") -> None:
        """Counts one row; texts that differ in numbers only are one finding."""
        group = _NUMBER.sub("N", text)
        finding = self._found.get((kind, group))
        if finding is None:
            if self._groups.get(kind, 0) >= MAX_GROUPS:
                group = text = OTHERS
            else:
                self._groups[kind] = self._groups.get(kind, 0) + 1
            finding = self._found.setdefault((kind, group), Finding(kind, text[:_MAX_TEXT]))
        finding.count += 1
        if text != finding.text:
            finding.text = group[:_MAX_TEXT]
        if len(finding.examples) < MAX_EXAMPLES:
            example = {"source": place.source, "file": place.file, "row": place.row}
            note = detail or (text if text != finding.text else "")
            finding.examples.append({**example, "line": place.line, "detail": note[:_MAX_TEXT]})

    def count(self, *kinds: str) -> int:
        """Returns how many findings there are of ``kinds``."""
        return sum(found.count for found in self._found.values() if found.kind in kinds)

    def as_json(self) -> list[dict[str, Any]]:
        """Returns them as plain data, kinds in the order of `KINDS`, the most frequent first."""
        ordered = sorted(self._found.values(), key=lambda f: (KINDS.index(f.kind), -f.count))
        return [vars(finding) for finding in ordered]
