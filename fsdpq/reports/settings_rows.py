"""A recipe and a lock as rows of a page: dotted key, value, and where the value was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "\N{EN DASH}"
"""Shown where there is no value."""

MAX_FILES = 20
"""A page lists so many of a lock's files."""


@dataclass(frozen=True)
class SettingRow:
    """One value of a recipe, or of a lock.

    Attributes:
        key: dotted key, without its section where the page names that.
        value: as text.
        source: where it was written, empty for a default.
    """

    key: str
    value: str
    source: str = ""


def flatten(value: Any, *, max_items: int | None = None) -> dict[str, Any]:
    """Returns the values of nested mappings by dotted key; mappings in lists have a number.

    Args:
        value: plain data.
        max_items: of a list of mappings only so many are told, and how many more there are.
    """
    return dict(_leaves(value, "", max_items))


def list_written(settings: Mapping[str, Any], provenance: Mapping[str, str]) -> list[SettingRow]:
    """Returns what is no default, in the order of the recipe.

    Args:
        settings: the resolved recipe.
        provenance: dotted key -> where its value was written (`fsdpq.recipe.provenance`).
    """
    values = flatten(settings)
    return [
        SettingRow(key, plain_text(values[key]), str(provenance[key]))
        for key in values
        if key in provenance
    ]


def list_sections(settings: Mapping[str, Any]) -> dict[str, list[SettingRow]]:
    """Returns all values by section; those outside of sections are of ``recipe``."""
    sections: dict[str, list[SettingRow]] = {"recipe": []}
    for name, content in settings.items():
        if isinstance(content, dict):
            rows = [SettingRow(key, plain_text(value)) for key, value in flatten(content).items()]
            sections[name] = rows
        else:
            sections["recipe"].append(SettingRow(name, plain_text(content)))
    return {name: rows for name, rows in sections.items() if rows}


def list_environment(lock: Mapping[str, Any]) -> list[SettingRow]:
    """Returns a lock without what a page shows by itself, and without keys of caches."""
    shown = {name: value for name, value in lock.items() if name not in ("resolved", "provenance")}
    inputs = shown.get("inputs")
    if isinstance(inputs, dict) and isinstance(inputs.get("prepared"), dict):
        kept = {n: v for n, v in inputs["prepared"].items() if n not in ("key", "report")}
        shown["inputs"] = {**inputs, "prepared": kept}
    rows = flatten(shown, max_items=MAX_FILES)
    return [SettingRow(key, plain_text(value)) for key, value in rows.items()]


def summarize_environment(lock: Mapping[str, Any]) -> list[str]:
    """Returns the few words that tell most about where a run ran; what is not known is left out."""
    packages, hardware = _mapping(lock.get("packages")), _mapping(lock.get("hardware"))
    words = [f"fsdpq {lock['fsdpq']}"] if lock.get("fsdpq") else []
    words += [f"Python {lock['python']}"] if lock.get("python") else []
    wanted = ("torch", "transformers", "peft", "bitsandbytes", "hqq")
    words += [f"{name} {packages[name]}" for name in wanted if packages.get(name)]
    gpus = hardware.get("gpus")
    words += [str(gpu).partition(" (UUID")[0] for gpu in gpus] if isinstance(gpus, list) else []
    words += [str(hardware["cpu"])] if hardware.get("cpu") else []
    commit = _mapping(lock.get("git")).get("commit")
    return words + ([f"commit {str(commit)[:12]}"] if commit else [])


def plain_text(value: Any) -> str:
    """Returns plain data as text for people."""
    if value is None or value in ("", [], {}):
        return NOTHING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(plain_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain_text(item)}" for key, item in value.items())
    return str(value)


def _leaves(value: Any, path: str, max_items: int | None) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key), max_items)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value[:max_items]):
            yield from _leaves(item, f"{path}.{index}", max_items)
        if max_items is not None and len(value) > max_items:
            yield f"{path}.{max_items}", f"and {len(value) - max_items:,} more"
    elif path:
        yield path, value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
