"""From PyYAML's nodes to plain data, with a mark for everything and a bound on everything.

Only mappings, lists and scalars are built. Anchors, aliases and merge keys work; what they expand
to is counted, so that an alias bomb ends after `MAX_NODES` values. An alias is the node of its
anchor, so its value's mark is where the anchor stands.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import yaml

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.recipe.marks import KeyPath, Marks
from fsdpq.recipe.scalars import TAG, parse_scalar

MAX_DEPTH = 20
MAX_NODES = 10_000

_INVISIBLE = {
    "\u00a0": "a no-break space",
    "\u200b": "a zero-width space",
    "\ufeff": "a byte order mark",
}


class DataBuilder:
    """Builds plain data from nodes, noting marks and Problems on the way."""

    def __init__(self, source: str, lines: list[str]) -> None:
        self.source = source
        self.lines = lines
        self.marks = Marks()
        self.problems: list[Problem] = []
        self._num_nodes = 0
        self._open: set[int] = set()
        self._told: set[tuple[str, Location | None]] = set()

    def at(self, line: int, column: int, length: int = 1) -> Location:
        """Returns the location of 0-based ``line`` and ``column``."""
        text = self.lines[line] if line < len(self.lines) else ""
        return Location(self.source, line + 1, column + 1, text, max(1, length))

    def locate(self, node: yaml.Node) -> Location:
        """Returns the location of ``node``, underlined up to the end of its first line."""
        start, end = node.start_mark, node.end_mark
        text = self.lines[start.line] if start.line < len(self.lines) else ""
        last = end.column if end.line == start.line else len(text.rstrip())
        return self.at(start.line, start.column, last - start.column)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Returns the plain value of ``node``; None, with a Problem, where there is none.

        Raises:
            RecipeError: aliases expand to more than any recipe holds.
        """
        self._count(node, path)
        self.marks.values[path] = self.locate(node)
        if isinstance(node, yaml.ScalarNode):
            kind = node.tag.removeprefix(TAG)
            if kind in ("str", "int", "float", "bool", "null"):
                return self._build_scalar(kind, node, path)
        with self._entered(node, path) as entered:
            if not entered:
                return None
            if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
                data: dict[str, Any] = {}
                self._fill(node, data, path, merged=False)
                return data
            if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
                return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        tag = node.tag.replace(TAG, "!!")
        self._report(node, path, f"the tag `{tag}` has no place in a recipe", "delete the tag")
        return None

    def _fill(
        self, node: yaml.MappingNode, data: dict[str, Any], path: KeyPath, *, merged: bool
    ) -> None:
        """Adds the keys of ``node`` to ``data``; merged keys do not replace what is there."""
        merges: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if _is_merge_key(key_node):
                merges.append(value_node)
                if len(merges) == 2 and not merged:
                    hint = "write one: `<<: [*first, *second]`"
                    self._report(key_node, path, "the key `<<` is there twice", hint)
                continue
            key = self._read_key(key_node, path)
            if key is None:
                continue
            if key not in data:
                self.marks.keys[(*path, key)] = self.locate(key_node)
                data[key] = self.build(value_node, (*path, key))
            elif not merged:
                first = self.marks.keys[(*path, key)].line
                hint = f"delete one of them (the first is on line {first})"
                self._report(key_node, (*path, key), f"the key `{key}` is there twice", hint)
        for source in merges:
            self._merge(source, data, path)

    def _merge(self, source: yaml.Node, data: dict[str, Any], path: KeyPath) -> None:
        """Adds what ``<<: source`` brings; of several mappings the first wins."""
        self._count(source, path)
        with self._entered(source, path) as entered:
            if not entered:
                return
            if isinstance(source, yaml.MappingNode) and source.tag == TAG + "map":
                self._fill(source, data, path, merged=True)
                return
            is_list = isinstance(source, yaml.SequenceNode)
            if is_list and all(isinstance(item, yaml.MappingNode) for item in source.value):
                for item in source.value:
                    self._merge(item, data, path)
                return
        hint = "write `<<: *name`, where `&name` stands before a mapping"
        self._report(source, path, "`<<` merges a mapping, or a list of mappings", hint)

    def _read_key(self, node: yaml.Node, path: KeyPath) -> str | None:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(text, str) or node.tag != TAG + "str":
            hint = "put quotes around it" if isinstance(text, str) else "write `key: value`"
            self._report(node, path, "a key must be a string", hint)
            return None
        for character, name in _INVISIBLE.items():
            if character in text:
                message = f"this key holds {name} (U+{ord(character):04X})"
                self._report(node, path, message, "type the line again with plain spaces")
                return None
        return text

    def _build_scalar(self, kind: str, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = cast("str", node.value)
        try:
            return parse_scalar(kind, text)
        except (ValueError, KeyError):
            shown = text if len(text) <= 40 else text[:37] + "..."
            shown = shown.encode("unicode_escape").decode()
            what = "string" if kind == "str" else kind
            self._report(node, path, f"`{shown}` is no {what} that can be used", "change the value")
            return None

    def _count(self, node: yaml.Node, path: KeyPath) -> None:
        self._num_nodes += 1
        if self._num_nodes <= MAX_NODES and len(path) <= MAX_DEPTH:
            return
        message = f"the aliases of this file expand to more than {MAX_NODES} values"
        if len(path) > MAX_DEPTH:
            message = f"aliases nest deeper than {MAX_DEPTH} levels"
        hint = "a recipe has sections and their keys: write values out where they are needed"
        raise RecipeError([Problem(message, location=self.locate(node), hint=hint)])

    @contextmanager
    def _entered(self, node: yaml.Node, path: KeyPath) -> Generator[bool, None, None]:
        """Yields False, with a Problem, where ``node`` is being built already."""
        if id(node) in self._open:
            message = "this anchor holds an alias of itself"
            self._report(node, path, message, "delete the alias inside of it")
            yield False
            return
        self._open.add(id(node))
        try:
            yield True
        finally:
            self._open.discard(id(node))

    def _report(self, node: yaml.Node, path: KeyPath, message: str, hint: str) -> None:
        key = ".".join(str(part) for part in path)
        problem = Problem(message, key, self.locate(node), hint)
        told = (message, problem.location)
        if told not in self._told:  # what an alias repeats is wrong once
            self._told.add(told)
            self.problems.append(problem)


def _is_merge_key(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "<<" and not node.style
