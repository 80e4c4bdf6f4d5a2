"""What a row of each ``data.format`` holds: its columns, what is wrong with a row, example rows.

Torch-free, because both halves need it: the launcher checks every row before any rank starts, the
worker's data room renders the rows that were found good. How a row becomes text and which tokens
carry loss is the data room's (`fsdpq.data.render`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

MESSAGE_ROLES: Mapping[str, str] = MappingProxyType(
    {
        "system": "system", "user": "user", "assistant": "assistant",
        "human": "user", "gpt": "assistant",
    }
)  # fmt: skip
"""Roles as rows spell them -> as chat templates do; ``human`` and ``gpt`` are ShareGPT's."""

GUANACO_HUMAN, GUANACO_ASSISTANT = "### Human:", "### Assistant:"

DUMMY_ROWS = 512
"""Rows of ``format: dummy`` where ``data.max_rows`` is null."""


@dataclass(frozen=True)
class DataFormat:
    """The shape of a row.

    Attributes:
        name: as ``data.format`` says it.
        columns: every row has them; all hold text, but ``messages`` a list of messages.
        optional: columns that may be missing, null or empty.
        aliases: other name of a column -> the column.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def fits(self, row_columns: Iterable[str]) -> bool:
        """Returns whether rows with these columns have what the format needs."""
        have = {self.aliases.get(name, name) for name in row_columns}
        return bool(self.columns) and have >= set(self.columns)


FORMATS: Mapping[str, DataFormat] = MappingProxyType(
    {
        known.name: known
        for known in (
            DataFormat(
                "messages",
                ("messages",),
                aliases=MappingProxyType({"conversations": "messages"}),
            ),
            DataFormat("prompt_completion", ("prompt", "completion")),
            DataFormat("alpaca", ("instruction", "output"), optional=("input",)),
            DataFormat("guanaco", ("text",)),
            DataFormat("qna", ("question", "context", "answer")),
            DataFormat("qna_no_ctx", ("question", "answer")),
            DataFormat("text", ("text",)),
            DataFormat("dummy", ()),
        )
    }
)
"""Every ``data.format`` by its name; of two that fit a row the more demanding comes first."""


def fitting_formats(row_columns: Iterable[str]) -> list[str]:
    """Returns the formats that rows with these columns could be."""
    columns = list(row_columns)
    return [name for name, known in FORMATS.items() if known.fits(columns)]


def named_columns(row: Mapping[str, Any], format_name: str) -> dict[str, Any]:
    """Returns the columns of ``row`` that its format reads, under the format's names."""
    known = FORMATS[format_name]
    wanted = {*known.columns, *known.optional}
    renamed = {known.aliases.get(name, name): value for name, value in row.items()}
    return {name: value for name, value in renamed.items() if name in wanted}


def find_mistake(row: Mapping[str, Any], format_name: str) -> str:
    """Returns what makes ``row`` no row of its format, empty when nothing does."""
    known = FORMATS[format_name]
    have = named_columns(row, format_name)
    missing = [f"`{name}`" for name in known.columns if name not in have]
    if missing:
        return f"no {', '.join(missing)} in this row (it has {_list_columns(row)})"
    if format_name == "messages":
        return _find_message_mistake(have["messages"])
    for name, value in have.items():
        if not isinstance(value, str) and not (name in known.optional and value is None):
            return f"`{name}` is {_type_name(value)}, not text"
    if format_name == "guanaco":
        text: str = have["text"]
        if not text.lstrip().startswith(GUANACO_HUMAN):
            return f"`text` does not begin with `{GUANACO_HUMAN}`"
        if GUANACO_ASSISTANT not in text:
            return f"`text` has no `{GUANACO_ASSISTANT}`"
    return ""


def describe_row(format_name: str, row_columns: Iterable[str] = ()) -> str:
    """Returns the hint for a row that is not of its format: what would fit, or how one reads."""
    fitting = [name for name in fitting_formats(row_columns) if name != format_name]
    if fitting:
        choices = " or ".join(f"`data.format: {name}`" for name in fitting)
        return f"its columns fit {choices}"
    return f"a row of `{format_name}` reads {_EXAMPLES[format_name]}"


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns messages without mistake as ``role`` and ``content``, ShareGPT's mapped."""
    return [
        {
            "role": MESSAGE_ROLES[message["role"] if "role" in message else message["from"]],
            "content": message["content"] if "content" in message else message["value"],
        }
        for message in messages
    ]


def made_up_rows(format_name: str, count: int) -> list[dict[str, Any]]:
    """Returns ``count`` different small rows of a format, to try a recipe without its data.

    ``dummy`` has no rows to read: its list is empty.
    """
    return [_made_up_row(format_name, index) for index in range(count) if format_name != "dummy"]


def _made_up_row(format_name: str, index: int) -> dict[str, Any]:
    question, answer = f"What is {index} plus {index + 1}?", f"It is {2 * index + 1}."
    rows: dict[str, dict[str, Any]] = {
        "messages": {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        },
        "prompt_completion": {"prompt": question, "completion": answer},
        "alpaca": {
            "instruction": "Add the numbers.",
            "input": f"{index} and {index + 1}" if index % 2 else "",
            "output": answer,
        },
        "guanaco": {"text": f"{GUANACO_HUMAN} {question}{GUANACO_ASSISTANT} {answer}"},
        "qna": {"question": question, "context": "Whole numbers.", "answer": answer},
        "qna_no_ctx": {"question": question, "answer": answer},
        "text": {"text": f"{question} {answer}"},
    }
    return rows[format_name]


def _find_message_mistake(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list of messages"
    for number, item in enumerate(cast("list[Any]", messages), start=1):
        if not isinstance(item, dict):
            return f"message {number} is {_type_name(item)}, not an object"
        message = cast("dict[str, Any]", item)
        role = message.get("role", message.get("from"))
        if role not in MESSAGE_ROLES:
            known = ", ".join(f"`{name}`" for name in MESSAGE_ROLES)
            return f"message {number} has the role `{role}`, which is none of {known}"
        if not isinstance(message.get("content", message.get("value")), str):
            return f"message {number} has no text in `content`"
    return ""


def _list_columns(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no columns"


_TYPE_NAMES = {
    "NoneType": "null", "str": "text", "int": "a number", "float": "a number", "bool": "a boolean",
    "list": "a list", "dict": "an object",
}  # fmt: skip


def _type_name(value: Any) -> str:
    name = type(value).__name__
    return _TYPE_NAMES.get(name, name)


_EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "messages": (
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
        ),
        "prompt_completion": '{"prompt": "...", "completion": "..."}',
        "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
        "guanaco": '{"text": "### Human: ...### Assistant: ..."}',
        "qna": '{"question": "...", "context": "...", "answer": "..."}',
        "qna_no_ctx": '{"question": "...", "answer": "..."}',
        "text": '{"text": "..."}',
        "dummy": "nothing: it is made up",
    }
)
