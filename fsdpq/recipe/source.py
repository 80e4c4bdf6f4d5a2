"""Reading a recipe's YAML into plain data that remembers where everything was written.

PyYAML composes the node tree; values are built here, by the rules of YAML 1.2's core schema
(``1e-4`` is a number, ``on`` and ``no`` are strings: PyYAML alone follows YAML 1.1 and does the
opposite). Recipes come from strangers, so this reader builds nothing but mappings, lists and
scalars: tags, aliases, deep nesting and huge files are refused, each with a located Problem.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.reader import ReaderError

from fsdpq.errors import Location, Problem, RecipeError, UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_DIGITS = 100

KeyPath = tuple[str | int, ...]
"""Where a value sits: ``("adapter", "rank")``; a number is a place in a list."""

TAG = "tag:yaml.org,2002:"
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
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
_ADVICE = {
    "mapping values are not allowed here": "a value that contains `: ` needs quotes around it",
    "expected a single document": "delete the second `---`: one file holds one recipe",
    "could not find expected ':'": "write `key: value`",
    "while scanning a quoted scalar": "close the quote",
}


@dataclass
class Marks:
    """Where every key and value of a document was written."""

    keys: dict[KeyPath, Location] = field(default_factory=dict[KeyPath, Location])
    values: dict[KeyPath, Location] = field(default_factory=dict[KeyPath, Location])

    def key(self, path: KeyPath) -> Location | None:
        """Returns where the key at ``path`` was written, or its nearest enclosing key."""
        return _nearest(self.keys, path)

    def value(self, path: KeyPath) -> Location | None:
        """Returns where the value at ``path`` was written, or its nearest enclosing value."""
        return _nearest(self.values, path)


@dataclass(frozen=True)
class Source:
    """A recipe file as it was read.

    Attributes:
        path: the file as the user named it.
        raw: its bytes.
        data: the document; what could not be read is left out and has a Problem.
        marks: where its keys and values are.
        problems: duplicate keys, tags and other mistakes that do not hide the rest.
    """

    path: Path
    raw: bytes
    data: dict[str, Any]
    marks: Marks
    problems: list[Problem]


def read_source(path: Path) -> Source:
    """Reads the recipe file ``path``.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        RecipeError: it is no YAML document that a recipe could be.
    """
    raw = _read_bytes(path)
    text = _decode(path, raw)
    builder = _Builder(str(path), _LINE_BREAK.split(text))
    node = _compose(path, text, builder)
    if node is None:
        raise _refuse(Location(str(path)), "the recipe is empty", "see `recipes/quickstart.yaml`")
    if not isinstance(node, yaml.MappingNode):
        location = builder.locate(node)
        raise _refuse(location, "a recipe is a mapping of sections", "write `section:` lines")
    data = cast("dict[str, Any]", builder.build(node, ()))
    return Source(path=path, raw=raw, data=data, marks=builder.marks, problems=builder.problems)


def _nearest(table: dict[KeyPath, Location], path: KeyPath) -> Location | None:
    for end in range(len(path), 0, -1):
        if path[:end] in table:
            return table[path[:end]]
    return None


def _refuse(location: Location, message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(message, location=location, hint=hint)])


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"`{path}` is a directory", hint="name a recipe file in it")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = "`recipes/quickstart.yaml` is a recipe to start from"
        raise UsageError(f"there is no recipe `{path}`", hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "check the path and its permissions"
        raise UsageError(f"`{path}` cannot be read: {reason}", hint=hint) from None
    if len(raw) > MAX_BYTES:
        message = f"the file is larger than {MAX_BYTES // 1024} KiB: that is no recipe"
        raise _refuse(Location(str(path)), message, "name a recipe file")
    return raw


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"line {line} is not UTF-8 text"
        raise _refuse(Location(str(path)), message, "save the file as UTF-8") from None


def _compose(path: Path, text: str, builder: _Builder) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            cast("Any", loader).dispose()
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        column = error.position - (text.rfind("\n", 0, error.position) + 1)
        code = error.character if isinstance(error.character, int) else ord(error.character[:1])
        message = f"the character U+{code:04X} cannot stand in YAML"
        raise _refuse(builder.at(line, column), message, "delete it") from None
    except yaml.MarkedYAMLError as error:
        raise _refuse(*_explain_syntax(error, path, builder)) from None


def _explain_syntax(
    error: yaml.MarkedYAMLError, path: Path, builder: _Builder
) -> tuple[Location, str, str]:
    mark = error.problem_mark or error.context_mark
    location = builder.at(mark.line, mark.column) if mark else Location(str(path))
    problem, context = str(error.problem or ""), str(error.context or "")
    if isinstance(error, _RefusedError):
        return location, problem, context
    if "'\\t'" in problem:
        return location, "a tab cannot indent YAML", "indent with spaces"
    message = f"this is not YAML: {problem}" + (f" {context}" if context else "")
    for words, advice in _ADVICE.items():
        if words in problem or words in context:
            return location, message, advice
    return location, message, "check the indentation and the brackets around this line"


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is well-formed and not accepted; ``context`` is the hint."""


class _Loader(yaml.SafeLoader):
    """PyYAML's pure-Python composer with YAML 1.2 scalars, no aliases and bounded nesting.

    The pure one on purpose: libyaml's recursion ends in a crash, not in an exception.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way to extend
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node; see `yaml.composer.Composer.compose_node`."""
        loader = cast("Any", self)
        mark: yaml.Mark = loader.peek_event().start_mark
        if loader.check_event(yaml.AliasEvent):
            hint = "write the value out where it is needed"
            raise _RefusedError(hint, None, "aliases (`*name`) have no place in a recipe", mark)
        if self.depth >= MAX_DEPTH:
            hint = "a recipe has sections and their keys"
            raise _RefusedError(hint, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class ResolvedDumper(yaml.SafeDumper):
    """Writes plain data so that this reader and YAML 1.1 readers agree on every scalar."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Returns True: aliases are never written."""
        return True


ResolvedDumper.yaml_implicit_resolvers = {
    first: list(table) for first, table in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in reversed(_CORE_SCHEMA):  # inserted in front: the last one wins
    _whole = re.compile(rf"^(?:{_pattern.pattern})$")
    for _class in (_Loader, ResolvedDumper):
        for _character in [*_first, *([""] if _name == "null" else [])]:
            _table = _class.yaml_implicit_resolvers.setdefault(_character, [])
            _table.insert(0, (TAG + _name, _whole))


class _Builder:
    """Builds plain data from nodes, noting marks and Problems on the way."""

    def __init__(self, source: str, lines: list[str]) -> None:
        self.source = source
        self.lines = lines
        self.marks = Marks()
        self.problems: list[Problem] = []

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
        """Returns the plain value of ``node``; None, with a Problem, where there is none."""
        self.marks.values[path] = self.locate(node)
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag.startswith(TAG):
            kind = node.tag[len(TAG) :]
            if kind in ("str", "int", "float", "bool", "null"):
                return self._build_scalar(kind, node, path)
        tag = node.tag.replace(TAG, "!!")
        self._report(node, path, f"the tag `{tag}` has no place in a recipe", "delete the tag")
        return None

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key: Hashable = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key_node.tag != TAG + "str":
                hint = "put quotes around it" if isinstance(key, str) else "write `key: value`"
                self._report(key_node, path, "a key must be a string", hint)
            elif key in data:
                first = self.marks.keys[(*path, key)].line
                hint = f"delete one of them (the first is on line {first})"
                self._report(key_node, (*path, key), f"the key `{key}` is there twice", hint)
            else:
                self.marks.keys[(*path, key)] = self.locate(key_node)
                data[key] = self.build(value_node, (*path, key))
        return data

    def _build_scalar(self, kind: str, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = cast("str", node.value)
        try:
            return _parse_scalar(kind, text)
        except (ValueError, KeyError):
            shown = text if len(text) <= 40 else text[:37] + "..."
            shown = shown.encode("unicode_escape").decode()
            what = "string" if kind == "str" else kind
            self._report(node, path, f"`{shown}` is no {what} that can be used", "change the value")
            return None

    def _report(self, node: yaml.Node, path: KeyPath, message: str, hint: str) -> None:
        key = ".".join(str(part) for part in path)
        self.problems.append(Problem(message, key, self.locate(node), hint))


def _parse_scalar(kind: str, text: str) -> Any:
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
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", text))
