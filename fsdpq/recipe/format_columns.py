"""The columns that a row of each ``data.format`` has, by the names that ``data.columns`` may give.

Here because a recipe is checked without its rows; what the columns hold is said in
`fsdpq.rows.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class FormatColumns:
    """Names that one format reads.

    Attributes:
        needed: columns of every row.
        optional: columns that may be missing, null or empty.
        fields: fields of the objects inside of a column, as ``column.field``.
        note: what the columns hold, for people, where that is not plain text.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    note: str = ""

    @property
    def all(self) -> tuple[str, ...]:
        """Everything that ``data.columns`` may give another name."""
        return (*self.needed, *self.optional, *self.fields)


FORMAT_COLUMNS: Mapping[str, FormatColumns] = MappingProxyType(
    {
        "messages": FormatColumns(
            ("messages",),
            ("system", "tools"),
            ("messages.role", "messages.content", "messages.train"),
            "a list of role and content, or of from and value",
        ),
        "prompt_completion": FormatColumns(
            ("prompt", "completion"), ("tools",), note="two texts, or two lists of messages"
        ),
        "alpaca": FormatColumns(("instruction", "output"), ("input",)),
        "guanaco": FormatColumns(("text",), note="turns of ### Human: and ### Assistant:"),
        "qna": FormatColumns(("question", "context", "answer")),
        "qna_no_ctx": FormatColumns(("question", "answer")),
        "text": FormatColumns(("text",), note="all of it trained"),
        "input_output": FormatColumns(("segments",), note="a list of text and label"),
        "dummy": FormatColumns(()),
    }
)
"""Every ``data.format`` but ``auto``; of two that fit a row the more demanding comes first."""


def column_names(format_name: str) -> tuple[str, ...]:
    """Returns the names that ``data.columns`` may map: with ``auto`` those of all formats."""
    if format_name != "auto":
        return FORMAT_COLUMNS[format_name].all
    return tuple(dict.fromkeys(n for known in FORMAT_COLUMNS.values() for n in known.all))
