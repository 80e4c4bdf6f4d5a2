"""Values of rows, in words for people, and lists that CSV and others can hold as JSON text only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast


class MistakeError(ValueError):
    """A row is not of its format; the text says where and why."""


def as_list(value: Any) -> list[Any] | None:
    """Returns a list, also out of its JSON text; None where the value is neither."""
    if isinstance(value, list):
        return cast("list[Any]", value)
    parsed = parse_json(value)
    return cast("list[Any]", parsed) if isinstance(parsed, list) else None


def as_object(value: Any) -> dict[str, Any] | None:
    """Returns an object as it is; None where the value is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def parse_json(value: Any) -> Any:
    """Returns the list or object that a text is the JSON of; None where it is none."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def without_nulls(value: Any) -> Any:
    """Returns the same value without the null fields that column formats fill objects up with."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: without_nulls(item) for name, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in cast("list[Any]", value)]
    return value


_TYPE_NAMES = {
    "NoneType": "null", "str": "text", "int": "a number", "float": "a number", "bool": "a boolean",
    "list": "a list", "dict": "an object",
}  # fmt: skip


def type_name(value: Any) -> str:
    """Returns what a value is, for people: ``a number``, ``null``."""
    name = type(value).__name__
    return _TYPE_NAMES.get(name, name)


def list_names(names: Iterable[str]) -> str:
    """Returns names in backticks, with commas between them."""
    return ", ".join(f"`{name}`" for name in names)
