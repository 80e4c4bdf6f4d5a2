"""Reading a recipe's YAML into plain data that remembers where everything was written.

PyYAML composes the node tree; `fsdpq.recipe.build_data` makes plain data of it, by the rules of
YAML 1.2 (`fsdpq.recipe.scalars`). Recipes come from strangers, so every dimension of a file has a
bound, and what is over it is refused with a located Problem: PyYAML takes 16 s for a megabyte of
short keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.reader import ReaderError

from fsdpq.errors import Location, Problem, RecipeError, UsageError
from fsdpq.recipe.build_data import MAX_DEPTH, MAX_NODES, DataBuilder
from fsdpq.recipe.marks import KeyPath, Marks
from fsdpq.recipe.scalars import Resolvers, add_core_schema

__all__ = ["KeyPath", "Marks", "Source", "parse_source", "read_source"]

MAX_BYTES = 1_000_000
MAX_LINES = 20_000
MAX_WORDS = 100_000

_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_ADVICE = {
    "mapping values are not allowed here": "a value that contains `: ` needs quotes around it",
    "expected a single document": "delete the second `---`: one file holds one recipe",
    "could not find expected ':'": "write `key: value`",
    "while scanning a quoted scalar": "close the quote",
    "found unknown escape character": "use single quotes: they take a backslash as it is",
    "found undefined alias": "write `&name` before the value that `*name` should repeat; a plain "
    "`*` needs quotes",
}


@dataclass(frozen=True)
class Source:
    """A recipe file as it was read.

    Attributes:
        path: the file as the user named it.
        raw: its bytes.
        lines: its text.
        data: the document; what could not be read is left out and has a Problem.
        marks: where its keys and values are.
        problems: duplicate keys, tags and other mistakes that do not hide the rest.
    """

    path: Path
    raw: bytes
    lines: list[str]
    data: dict[str, Any]
    marks: Marks
    problems: list[Problem]


def read_source(path: Path, *, what: str = "recipe") -> Source:
    """Reads the recipe file ``path``.

    Args:
        path: as messages show it.
        what: what the file is, for messages.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        RecipeError: it is no YAML document that a recipe could be.
    """
    return parse_source(path, _read_bytes(path, what), what=what)


def parse_source(path: Path, raw: bytes, *, what: str = "recipe") -> Source:
    """Reads the bytes of a recipe file.

    Args:
        path: as messages show it; relative paths of the recipe start from its directory.
        raw: what is in the file.
        what: what the file is, for messages.

    Raises:
        RecipeError: it is no YAML document that a recipe could be.
    """
    if len(raw) > MAX_BYTES:
        message = f"the file is larger than {MAX_BYTES // 10**6} MB: that is no recipe"
        raise _refuse(Location(str(path)), message, "name a recipe file")
    text = _decode(path, raw)
    lines = _LINE_BREAK.split(text)
    if len(lines) > MAX_LINES or len(text.split()) > MAX_WORDS:
        over = f"{MAX_LINES} lines" if len(lines) > MAX_LINES else f"{MAX_WORDS} words"
        message = f"the file has more than {over}: that is no recipe"
        raise _refuse(Location(str(path)), message, "name a recipe file")
    builder = DataBuilder(str(path), lines)
    node = _compose(path, text, builder)
    if node is None:
        raise _refuse(Location(str(path)), f"the {what} is empty", "see `recipes/quickstart.yaml`")
    if not isinstance(node, yaml.MappingNode):
        location = builder.locate(node)
        raise _refuse(location, f"a {what} is a mapping of sections", "write `section:` lines")
    data = cast("dict[str, Any]", builder.build(node, ()) or {})
    return Source(path, raw, lines, data, builder.marks, builder.problems)


def _refuse(location: Location, message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(message, location=location, hint=hint)])


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"`{path}` is a directory", hint=f"name a {what} file in it")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        start = "`recipes/quickstart.yaml` is a recipe to start from"
        hint = start if what == "recipe" else "check the path"
        raise UsageError(f"there is no {what} `{path}`", hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "check the path and its permissions"
        raise UsageError(f"`{path}` cannot be read: {reason}", hint=hint) from None
    return raw


def _decode(path: Path, raw: bytes) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        hint = "save the file as UTF-8"
        raise _refuse(Location(str(path)), "the file is UTF-16 text, not UTF-8", hint)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw.count(b"\n", 0, start) + 1
        column = len(raw[start : error.start].decode()) + 1
        text = raw[start:].split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")
        location = Location(str(path), line, column, text)
        message = f"line {line} is not UTF-8 text"
        hint = "save the file as UTF-8 (it may be Latin-1 or Windows-1252)"
        raise _refuse(location, message, hint) from None


def _compose(path: Path, text: str, builder: DataBuilder) -> yaml.Node | None:
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
        hint = "delete it" if code else "delete it, or save the file as UTF-8 text"
        raise _refuse(builder.at(line, column), message, hint) from None
    except yaml.MarkedYAMLError as error:
        raise _refuse(*_explain_syntax(error, path, builder)) from None


def _explain_syntax(
    error: yaml.MarkedYAMLError, path: Path, builder: DataBuilder
) -> tuple[Location, str, str]:
    mark = error.problem_mark or error.context_mark
    location = builder.at(mark.line, mark.column) if mark else Location(str(path))
    problem, context = str(error.problem or ""), str(error.context or "")
    if isinstance(error, _RefusedError):
        return location, problem, context
    if "'\\t'" in problem:
        return location, "a tab cannot indent YAML", "indent with spaces"
    if "duplicate anchor" in context:
        message = context.removeprefix("found ").partition(";")[0]
        return location, message, "give one of the two anchors another name"
    message = f"this is not YAML: {problem}" + (f" {context}" if context else "")
    if "${" in location.text and "flow" in context:
        return location, message, "inside of brackets put quotes around `${...}`"
    for words, advice in _ADVICE.items():
        if words in problem or words in context:
            return location, message, advice
    return location, message, "check the indentation and the brackets around this line"


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is well-formed and not accepted; ``context`` is the hint."""


class _Loader(yaml.SafeLoader):
    """PyYAML's pure-Python composer with YAML 1.2 scalars and bounded nesting and size.

    The pure one on purpose: libyaml's recursion ends in a crash, not in an exception.
    """

    yaml_implicit_resolvers: Resolvers = add_core_schema({})
    depth = 0
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node; see `yaml.composer.Composer.compose_node`."""
        mark: yaml.Mark = cast("Any", self).peek_event().start_mark
        self.num_nodes += 1
        hint = "a recipe has sections and their keys"
        if self.num_nodes > MAX_NODES:
            message = f"the file holds more than {MAX_NODES} keys and values: that is no recipe"
            raise _RefusedError(hint, None, message, mark)
        if self.depth >= MAX_DEPTH:
            raise _RefusedError(hint, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1
