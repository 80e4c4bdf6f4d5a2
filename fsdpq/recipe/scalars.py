"""Plain scalars by the rules of YAML 1.2's core schema, read and written.

PyYAML alone follows YAML 1.1: ``1e-4`` is a string there, ``on`` and ``no`` are booleans.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DIGITS = 100
TAG = "tag:yaml.org,2002:"

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_CORE_SCHEMA = (
    ("bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile("~|null|Null|NULL|"), "~nN"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)

Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]
"""PyYAML's table: first character of a scalar -> tags and the patterns that choose them."""


def add_core_schema(resolvers: Resolvers) -> Resolvers:
    """Puts the core schema in front of ``resolvers``, in place, and returns it."""
    for name, pattern, first in reversed(_CORE_SCHEMA):  # the last one put in front wins
        whole = re.compile(rf"^(?:{pattern.pattern})$")
        for character in [*first, *([""] if name == "null" else [])]:
            resolvers.setdefault(character, []).insert(0, (TAG + name, whole))
    return resolvers


def parse_scalar(kind: str, text: str) -> Any:
    """Returns the value of a plain scalar.

    Raises:
        ValueError, KeyError: an explicit tag that the text does not fit, or an absurd number.
    """
    if kind == "str":
        text.encode("utf-8")  # a lone surrogate ("\\ud800") could not be written to a file
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if len(text) > MAX_DIGITS:
        raise ValueError(text)
    if kind == "int":
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if abs(value) >= 2**63:
            raise ValueError(text)
        return value
    return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", text))


class ResolvedDumper(yaml.SafeDumper):
    """Writes plain data so that this reader and YAML 1.1 readers agree on every scalar."""

    yaml_implicit_resolvers = add_core_schema(
        {first: list(table) for first, table in yaml.SafeDumper.yaml_implicit_resolvers.items()}
    )

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Returns True: aliases are never written."""
        return True
