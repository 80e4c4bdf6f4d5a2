"""Recipes with one mistake each: a misspelt key, a value of a wrong type or out of range.

Text is edited in place, so that comments and layout stay. Where the mistake is comes from PyYAML's
own marks, what a field refuses from its model alone: neither is the code under test.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
REQUIRED = {"name_or_path": "x"}
OTHER_TYPES = ["banana", 7, 2.5, True, None, ["banana"], {"a": 1}]
LIMITS = {
    "minimum": lambda limit: limit - 1,
    "maximum": lambda limit: limit + 1,
    "exclusiveMinimum": lambda limit: limit,
    "exclusiveMaximum": lambda limit: limit,
    "minLength": lambda limit: "x" * (limit - 1),
    "maxLength": lambda limit: "x" * (limit + 1),
    "pattern": lambda _: "a b\\c",
    "enum": lambda known: f"{known[0]}-not",
}
"""Keyword of JSON Schema -> a value that it refuses."""


@dataclass(frozen=True)
class Field:
    """One field of the recipe's models.

    Attributes:
        kind: of its section, "" where that has none.
        path: ``("adapter", "rank")``, ``("metrics", "wandb", "project")``, ``("name",)``.
        owner: the class that has it.
    """

    kind: str
    path: tuple[str, ...]
    owner: type[Options]

    @property
    def id(self) -> str:
        return ".".join(self.path) + (f" ({self.kind})" if self.kind else "")

    def refuses(self, value: Any) -> bool:
        """Whether the field's own model refuses ``value`` for it."""
        data = {name: text for name, text in REQUIRED.items() if name in self.owner.model_fields}
        data |= {"kind": self.kind} if "kind" in self.owner.model_fields else {}
        try:
            self.owner.model_validate_json(json.dumps({**data, self.path[-1]: value}), strict=True)
        except ValidationError as error:
            return any(mistake["loc"][:1] == self.path[-1:] for mistake in error.errors())
        return False

    def wrong_types(self) -> list[Any]:
        """Returns values of other types than the field's."""
        return [value for value in OTHER_TYPES if self.refuses(value)]

    def out_of_range(self) -> list[Any]:
        """Returns values of the field's type that are none of its values."""
        schema = _schema_of(self.owner)["properties"][self.path[-1]]
        return [value for value in _beyond(schema) if self.refuses(value)]


def list_fields() -> list[Field]:
    """Returns every field of every section and kind, also those of mappings inside a section."""
    sections = list_sections()
    fields = [Field("", (name,), Recipe) for name in Recipe.model_fields if name not in sections]
    for section in sections.values():
        for kind, options in section.kinds.items():
            fields += _fields_of(kind, (section.name,), options)
    return fields


def misspell(word: str, position: int, how: str) -> str:
    """Returns ``word`` with one slip of the finger."""
    at = position % len(word)
    if how == "drop" and len(word) > 3:
        return word[:at] + word[at + 1 :]
    if how == "swap" and word[at : at + 1] != word[at + 1 : at + 2]:
        return word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return word[:at] + word[at] + word[at:]


def with_key(text: str, field: Field, key: str) -> tuple[str, tuple[int, int]]:
    """Returns ``text`` with the field's key spelt ``key``, and its 1-based line and column."""
    edited = _edit(text, field, key, None)
    nodes, path = _nodes(edited), (*field.path[:-1], key)
    return edited, _place(nodes[path][0])


def with_value(text: str, field: Field, value: Any) -> tuple[str, set[tuple[int, int]]]:
    """Returns ``text`` with the field set to ``value``, and the places that are in the value."""
    edited = _edit(text, field, field.path[-1], value)
    return edited, {_place(node) for node in _inside(_nodes(edited)[field.path][1])}


def data_with(data: dict[str, Any], field: Field, key: str, value: Any) -> dict[str, Any]:
    """Returns a recipe's data with ``key: value`` in the place of the field."""
    edited = deepcopy(data)
    entry: Any = edited
    for part in field.path[:-1]:
        if not isinstance(entry.get(part), dict):
            entry[part] = {}
        entry = entry[part]
        if field.kind and entry.get("kind") != field.kind:
            entry.clear()
            entry["kind"] = field.kind
    entry.pop(field.path[-1], None)
    entry[key] = value
    return edited


@cache
def _schema_of(owner: type[Options]) -> dict[str, Any]:
    return owner.model_json_schema()


def _beyond(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword, limit in schema.items():
        if keyword in LIMITS:
            yield LIMITS[keyword](limit)
    for part in schema.get("anyOf", ()):
        yield from _beyond(part)
    for value in _beyond(schema.get("items", {})) if "items" in schema else ():
        yield [value]
    if "prefixItems" in schema:
        first, *others = schema["prefixItems"]
        yield from ([value, *(0.5 for _ in others)] for value in _beyond(first))


def _fields_of(kind: str, path: tuple[str, ...], options: type[Options]) -> Iterator[Field]:
    for name, info in options.model_fields.items():
        yield Field(kind, (*path, name), options)
        is_union = get_origin(info.annotation) in (Union, types.UnionType)
        for member in get_args(info.annotation) if is_union else (info.annotation,):
            if isinstance(member, type) and issubclass(member, Options):
                yield from _fields_of(kind, (*path, name), member)


def _edit(text: str, field: Field, key: str, value: Any) -> str:
    """Returns ``text`` with ``key: value`` at the field; None keeps the value that is there."""
    shown = json.dumps(value)
    nodes, section = _nodes(text), field.path[:1]
    entry = nodes.get((*section, "kind"))
    inner = {key: value if value is not None or key == field.path[-1] else 1}
    for part in reversed(field.path[1:-1]):
        inner = {part: inner}
    if len(field.path) > 1 and section not in nodes:
        whole = {"kind": field.kind, **inner} if field.kind and "kind" not in inner else inner
        return f"{text.rstrip()}\n{section[0]}: {json.dumps(whole)}\n"
    if field.kind and entry is not None and entry[1].value != field.kind:
        whole = {"kind": field.kind, **inner} if field.path[-1] != "kind" else inner
        whole = {key: field.kind} if field.path[-1] == "kind" and key != "kind" else whole
        return _replace(text, nodes[section], json.dumps(whole))
    if field.path in nodes:
        key_node, value_node = nodes[field.path]
        if key == field.path[-1]:
            return _replace(text, (key_node, value_node), shown)
        return text[: key_node.start_mark.index] + key + text[key_node.end_mark.index :]
    return _insert(text, field, nodes, key, shown)


def _insert(text: str, field: Field, nodes: dict[Any, Any], key: str, shown: str) -> str:
    parent, line = field.path[:-1], f"{key}: {shown}"
    while parent and not isinstance(nodes.get(parent, (None, None))[1], yaml.MappingNode):
        if parent in nodes:
            return _replace(text, nodes[parent], f"{{{line}}}")
        line, parent = f"{parent[-1]}: {{{line}}}", parent[:-1]
    mapping = nodes[parent][1] if parent else None
    if mapping is None:
        return f"{text.rstrip()}\n{line}\n"
    start = mapping.start_mark.index
    if mapping.flow_style:
        return f"{text[: start + 1]}{line}, {text[start + 1 :]}"
    return f"{text[:start]}{line}\n{' ' * mapping.start_mark.column}{text[start:]}"


def _replace(text: str, nodes: tuple[Any, Any], shown: str) -> str:
    """Returns ``text`` with another value behind a key."""
    key_node, value_node = nodes
    block = isinstance(value_node, yaml.CollectionNode) and not value_node.flow_style
    end = value_node.end_mark.index
    return f"{text[: key_node.end_mark.index]}: {shown}{chr(10) if block else ''}{text[end:]}"


@lru_cache(maxsize=128)
def _nodes(text: str) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Returns path -> key and value node of every key."""
    found: dict[tuple[str, ...], tuple[Any, Any]] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = (key, value)
                visit(value, (*path, key.value))

    visit(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), ())
    return found


def _inside(node: Any) -> Iterator[Any]:
    yield node
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in part if isinstance(part, tuple) else (part,):
            yield from _inside(inner)


def _place(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
