"""What a row of each ``data.format`` holds: its columns, and what is wrong with a row.

Torch-free, because both halves need it: the launcher checks every row before any rank starts, the
worker's data room renders the rows that were found good. How a row becomes text and which tokens
carry loss is the data room's (`fsdpq.data.text.render`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from fsdpq.recipe.describe import suggest
from fsdpq.recipe.format_columns import FORMAT_COLUMNS
from fsdpq.rows.examples import EXAMPLES
from fsdpq.rows.messages import check_order, is_conversation, read_conversation
from fsdpq.rows.values import MistakeError, as_list, list_names, type_name

GUANACO_HUMAN, GUANACO_ASSISTANT = "### Human:", "### Assistant:"

DUMMY_ROWS = 512
"""Rows of ``format: dummy`` where ``data.max_rows`` is null."""

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
"""What ``data.columns`` is where nothing is renamed."""


@dataclass(frozen=True)
class DataFormat:
    """The shape of a row.

    Attributes:
        name: as ``data.format`` says it.
        columns: every row has them; all hold text, but ``messages`` and ``segments`` (lists), and
            ``prompt`` and ``completion`` where both are lists of messages.
        optional: columns that may be missing, null or empty.
        aliases: other name of a column, taken where the column itself is missing -> the column.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def fits(
        self,
        row_columns: Iterable[str],
        columns: Mapping[str, str] = NO_COLUMNS,
        *,
        by_alias: bool = True,
    ) -> bool:
        """Returns whether rows with these columns have what the format needs.

        Args:
            row_columns: names of the file.
            columns: the recipe's ``data.columns``.
            by_alias: whether other names of its columns count.
        """
        have = set(row_columns)
        taken = {*columns, *columns.values()}
        found = have - taken
        found |= {
            name
            for name, other in columns.items()
            if other in have or other.partition(".")[0] in have
        }
        if by_alias:
            found |= {self.aliases[name] for name in have - taken if name in self.aliases}
        return bool(self.columns) and found >= set(self.columns)


_MESSAGES_HINT = (
    'messages read {"role": "user", "content": "..."}, user and assistant in turn; '
    "`data.on_bad_row: skip` leaves such rows out"
)
_ALIASES: Mapping[str, Mapping[str, str]] = {
    "messages": {"conversations": "messages", "conversation": "messages"},
    "prompt_completion": {"query": "prompt", "response": "completion"},
    "alpaca": {"response": "output", "context": "input"},
    "text": {"content": "text"},
}
"""Other names that datasets in wide use have (ShareGPT, OpenOrca, Dolly), where taking them cannot
leave out another column that the row is about."""

FORMATS: Mapping[str, DataFormat] = MappingProxyType(
    {
        name: DataFormat(
            name, known.needed, known.optional, MappingProxyType(dict(_ALIASES.get(name, {})))
        )
        for name, known in FORMAT_COLUMNS.items()
    }
)
"""Every ``data.format`` but ``auto`` by its name; of two that fit a row the more demanding comes
first."""


def fitting_formats(
    row_columns: Iterable[str],
    columns: Mapping[str, str] = NO_COLUMNS,
    *,
    by_alias: bool = False,
) -> list[str]:
    """Returns the formats that rows with these columns could be; see `DataFormat.fits`."""
    present = list(row_columns)
    return [
        name for name, known in FORMATS.items() if known.fits(present, columns, by_alias=by_alias)
    ]


def named_columns(
    row: Mapping[str, Any], format_name: str, columns: Mapping[str, str] = NO_COLUMNS
) -> dict[str, Any]:
    """Returns the columns of ``row`` that its format reads, under the format's names.

    Args:
        row: as its file has it.
        format_name: a key of `FORMATS`.
        columns: the recipe's ``data.columns``: name in the format -> name in the file, where a dot
            leads into an object (``message.text``). A column that it gives to one name is not
            read under its own too.
    """
    known = FORMATS[format_name]
    found: dict[str, Any] = {}
    taken = {*columns, *columns.values()}
    for name in (*known.columns, *known.optional):
        if name in row and name not in taken:
            found[name] = row[name]
        elif name in columns:
            is_there, value = _look_up(row, columns[name])
            found |= {name: value} if is_there else {}
    for other, name in known.aliases.items():
        if other in row and other not in taken and name not in (*found, *columns):
            found[name] = row[other]
    fields = {name: other for name, other in columns.items() if name.startswith("messages.")}
    if fields and "messages" in found:
        found["messages"] = _rename_fields(found["messages"], fields)
    return found


def find_mistake(
    row: Mapping[str, Any], format_name: str, columns: Mapping[str, str] = NO_COLUMNS
) -> str:
    """Returns what makes ``row`` no row of its format, empty when nothing does.

    Args:
        row: as its file has it.
        format_name: a key of `FORMATS`.
        columns: the recipe's ``data.columns``.
    """
    known = FORMATS[format_name]
    have = named_columns(row, format_name, columns)
    missing = [name for name in known.columns if name not in have]
    if missing:
        return _say_missing(missing, row, columns)
    try:
        if is_conversation(have, format_name):
            conversation = read_conversation(have)
            check_order(conversation.messages, has_system_column=bool(have.get("system")))
        elif format_name == "input_output":
            read_segments(have["segments"])
        else:
            _check_texts(have, known)
    except MistakeError as error:
        return str(error)
    return ""


def read_segments(value: Any) -> list[tuple[str, bool]]:
    """Returns text and loss flag of every segment of an ``input_output`` row.

    Raises:
        MistakeError: ``value`` is no list of ``{"text": ..., "label": true or false}``.
    """
    items = as_list(value)
    if not items:
        raise MistakeError("`segments` is not a list of segments")
    segments: list[tuple[str, bool]] = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise MistakeError(f"segment {number} is {type_name(item)}, not an object")
        segment = cast("dict[str, Any]", item)
        text, label = segment.get("text"), segment.get("label")
        if not isinstance(text, str):
            raise MistakeError(f"segment {number} has no text in `text`")
        if not isinstance(label, bool):
            raise MistakeError(f"segment {number} has no `label` that is true or false")
        segments.append((text, label))
    return segments


def describe_row(
    format_name: str, row_columns: Iterable[str] = (), columns: Mapping[str, str] = NO_COLUMNS
) -> str:
    """Returns the hint for a row that is not of its format: what would fit, or how one reads."""
    present = list(row_columns)
    fitting = fitting_formats(present, columns)
    if not fitting and not FORMATS[format_name].fits(present, columns):
        fitting = fitting_formats(present, columns, by_alias=True)
    fitting = [name for name in fitting if name != format_name]
    if fitting:
        choices = " or ".join(f"`data.format: {name}`" for name in fitting)
        return f"its columns fit {choices}"
    if format_name == "messages" and FORMATS[format_name].fits(present, columns):
        return _MESSAGES_HINT
    return f"a row of `{format_name}` reads {EXAMPLES[format_name]}"


def _look_up(row: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Returns whether ``row`` has the column, and its value; dots lead into objects."""
    if path in row:
        return True, row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = cast("Mapping[str, Any]", value)[part]
    return True, value


def _rename_fields(messages: Any, fields: Mapping[str, str]) -> Any:
    """Returns messages with ``messages.role`` and the like under their own names."""
    items = as_list(messages)
    if items is None or not all(isinstance(item, dict) for item in items):
        return messages
    renamed: list[dict[str, Any]] = []
    for item in items:
        message = dict(cast("dict[str, Any]", item))
        for name, other in fields.items():
            field_name = name.removeprefix("messages.")
            message.pop(field_name, None)
            is_there, value = _look_up(item, other)
            if is_there:
                message[field_name] = value
        renamed.append(message)
    return renamed


def _say_missing(missing: list[str], row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    has = f"it has {list_names(row) or 'no columns'}"
    renamed = [name for name in missing if name in columns]
    if renamed:
        name = renamed[0]
        guess = suggest(columns[name], row)
        meant = f"; did you mean `{guess}`?" if guess else ""
        return f"no `{columns[name]}` in this row, which is `{name}` ({has}){meant}"
    return f"no {list_names(missing)} in this row ({has})"


def _check_texts(have: dict[str, Any], known: DataFormat) -> None:
    for name, value in have.items():
        if not isinstance(value, str) and not (name in known.optional and value is None):
            raise MistakeError(f"`{name}` is {type_name(value)}, not text")
    if known.name == "guanaco":
        text: str = have["text"]
        if not text.lstrip().startswith(GUANACO_HUMAN):
            raise MistakeError(f"`text` does not begin with `{GUANACO_HUMAN}`")
        if GUANACO_ASSISTANT not in text:
            raise MistakeError(f"`text` has no `{GUANACO_ASSISTANT}`")
