"""A recipe as YAML text, with a comment for every key: where it came from, what was left behind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

import fsdpq
from fsdpq.importing.result import TITLES, Finding, ImportResult, Outcome, one_line
from fsdpq.recipe.interpolate import escape
from fsdpq.recipe.scalars import ResolvedDumper

_COLUMN = 46
_TOLD: tuple[Outcome, ...] = ("dropped", "unusable", "no_counterpart", "assumed")


def write_recipe(result: ImportResult, *, out: Path | None = None) -> str:
    """Returns the text of the recipe; reading it gives ``result.document``.

    Args:
        result: the import.
        out: where the recipe will lie, for the commands in its head.
    """
    return "\n".join(_lines(result, str(out) if out else "recipe.yaml")) + "\n"


def _lines(result: ImportResult, name: str) -> Iterator[str]:
    yield "# yaml-language-server: $schema=recipe.schema.json"
    yield "#"
    source = one_line(result.source)
    yield f"# Imported from {result.tool} ({source}) by fsdpq {fsdpq.__version__}."
    yield "#"
    yield f"#   fsdpq validate {one_line(name)}"
    yield f"#   fsdpq train {one_line(name)}"
    yield "#   fsdpq schema > recipe.schema.json    so that an editor completes and checks the keys"
    yield ""
    for key, value in result.document.items():
        if isinstance(value, dict):
            yield ""
            yield f"{key}:"
            yield from _section(cast("dict[str, Any]", value), key, result.origins, "  ")
        else:
            yield f"{key}: {_flow(value)}"
    yield from _rest(result)


def _section(
    values: dict[str, Any], path: str, origins: dict[str, str], indent: str
) -> Iterator[str]:
    for name, value in values.items():
        target = f"{path}.{name}"
        if isinstance(value, dict) and any(key.startswith(f"{target}.") for key in origins):
            yield f"{indent}{name}:"
            yield from _section(cast("dict[str, Any]", value), target, origins, indent + "  ")
            continue
        if _is_list_of_mappings(value):
            yield f"{indent}{name}:"
            for index, part in enumerate(cast("list[dict[str, Any]]", value)):
                lines = list(_section(part, f"{target}.{index}", origins, indent + "    "))
                yield from [f"{indent}  - {lines[0].lstrip()}", *lines[1:]]
            continue
        line = f"{indent}{name}: {_flow(value)}"
        origin = origins.get(target)
        yield f"{line:<{_COLUMN}}  # {one_line(origin)}" if origin else line


def _is_list_of_mappings(value: Any) -> bool:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return bool(items) and all(isinstance(item, dict) for item in items)


def _flow(value: Any) -> str:
    """Returns ``value`` as YAML on one line."""
    text = yaml.dump(
        [escape(value)],
        Dumper=ResolvedDumper,
        default_flow_style=True,
        allow_unicode=False,
        width=2**31,
    )
    return text.strip()[1:-1]


def _rest(result: ImportResult) -> Iterator[str]:
    for outcome in _TOLD:
        found = result.of(outcome)
        if found:
            yield ""
            yield f"# {TITLES[outcome].format(tool=result.tool)}:"
        for finding in found:
            yield from textwrap.wrap(
                _sentence(finding), 98, initial_indent="#   ", subsequent_indent="#     ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip


def _sentence(finding: Finding) -> str:
    place = f"line {finding.location.line}: " if finding.location and finding.location.line else ""
    shown = f"{finding.key}: {finding.value}" if finding.value not in ("", "null") else finding.key
    return f"{place}`{shown}`: {finding.message}" if finding.key else f"{place}{finding.message}"
