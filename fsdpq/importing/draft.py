"""The recipe in the making, and the rules that fill it from a tool's keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from fsdpq.errors import Problem
from fsdpq.importing.result import Finding, Outcome, one_line
from fsdpq.importing.values import Reader, UnusableError, is_off, mapping
from fsdpq.recipe.describe import show_value, suggest
from fsdpq.recipe.source import KeyPath, Marks

_SHOWN = 60
_RENAMED = {"use_4bit": "load_in_4bit", "use_8bit": "load_in_8bit"}
"""Names that spelling does not lead away from."""
NOTHING_LIKE_IT = "fsdpq has nothing like it"


class Draft:
    """A recipe under construction.

    Attributes:
        tool: name of the source tool.
        data: the source's document.
        document: the recipe so far.
        origins: recipe key -> source key.
        findings: what became of the keys so far.
        parts: keys that several of together say something -> the recipe keys they say it at.
        directory: of the config, for files that it names.
    """

    def __init__(
        self, tool: str, data: Mapping[str, Any], marks: Marks, *, directory: Path = Path()
    ) -> None:
        self.tool = tool
        self.directory = directory
        self.data = data
        self.marks = marks
        self.document: dict[str, Any] = {"version": 1, "name": "", "model": {}}
        self.origins: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.parts: dict[str, str] = {}

    def get(self, key: str) -> Any:
        """Returns the source's value at the dotted ``key``, None where there is none."""
        return _value_at(self.data, key_path(key))

    def read(self, key: str, reader: Reader, default: Any = None) -> Any:
        """Returns what ``reader`` makes of the value at ``key``; ``default`` where it is unset.

        A value that cannot be used is reported and counts as unset.
        """
        value = self.get(key)
        if value is None:
            return default
        try:
            return reader(value)
        except UnusableError as error:
            self.note("unusable", key, f"`{key}` {error}")
            return default

    def on(self, key: str) -> bool:
        """Returns whether the source switches ``key`` on."""
        return not is_off(self.get(key))

    def has(self, target: str) -> bool:
        """Returns whether the recipe says something at ``target``."""
        return self.at(target) is not None

    def at(self, target: str) -> Any:
        """Returns what the recipe says at ``target``, None where it says nothing."""
        return _value_at(self.document, key_path(target))

    def put(self, target: str, value: Any, *, key: str = "") -> None:
        """Writes ``value`` to the recipe's ``target``, as come from ``key`` where that is set."""
        *sections, field = target.split(".")
        place = self.document
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
        if self.get(key) is not None:
            self.origins[target] = key

    def drop(self, target: str) -> None:
        """Takes ``target`` out of the recipe."""
        *sections, field = target.split(".")
        place: Any = self.at(".".join(sections)) if sections else self.document
        if isinstance(place, dict):
            cast("dict[str, Any]", place).pop(field, None)
        self.origins.pop(target, None)

    def default(self, target: str, value: Any, key: str = "") -> None:
        """Writes a default of the source tool where the source is silent about ``target``."""
        if self.has(target) or target in self.origins:
            return
        self.put(target, value)
        message = f"{self.tool}'s default" + (f" of `{key}`" if key else "")
        self.findings.append(Finding("default", key, show_value(value), target, message))

    def note(self, outcome: Outcome, key: str, message: str = "", *, target: str = "") -> None:
        """Reports what became of the source's ``key``."""
        value = self.get(key)
        shown = value if isinstance(value, str) and len(value) <= _SHOWN else show_value(value)
        shown, path = one_line(shown), key_path(key)
        location = self.marks.keys.get(path) or self.marks.value(path)
        self.findings.append(
            Finding(outcome, one_line(key), shown, target, one_line(message), location)
        )

    def report_problem(self, problem: Problem, outcome: Outcome = "unusable") -> None:
        """Reports what the reader of the file could not take."""
        message = problem.message + (f": {problem.hint}" if problem.hint else "")
        finding = Finding(outcome, one_line(problem.key), message=one_line(message))
        self.findings.append(replace(finding, location=problem.location))

    def forget(self, target: str, message: str) -> None:
        """Takes ``target`` out again; its source key has no effect there either."""
        key = self.origins.get(target)
        self.drop(target)
        if key is None:
            return
        self.findings = [
            f for f in self.findings if not (f.key == key and f.outcome in ("converted", "assumed"))
        ]
        self.note("dropped", key, message)

    def settle(self) -> None:
        """Reports every key of ``parts`` that ``assemble`` said nothing about."""
        reported = {finding.key for finding in self.findings}
        for key, targets in self.parts.items():
            if key in reported:
                continue
            written = ", ".join(target for target in targets.split(", ") if self.has(target))
            outcome: Outcome = "converted" if written else "built_in"
            self.note(outcome, key, "" if written else "asks for nothing", target=written)


def _value_at(value: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(value, list):
            items = cast("list[Any]", value)
            value = items[part] if isinstance(part, int) and part < len(items) else None
        else:
            value = cast("dict[Any, Any]", value).get(part) if isinstance(value, dict) else None
    return value


def key_path(key: str) -> KeyPath:
    """Returns the parts of a dotted key; numbers are places in lists."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


class Rule(Protocol):
    """What becomes of one key."""

    @property
    def summary(self) -> str:
        """One line of Markdown for the documentation."""
        ...

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Handles ``value`` of the dotted ``key``, never None."""
        ...


@dataclass(frozen=True)
class To:
    """The value goes to one recipe key; with ``note`` the meaning is close, not the same."""

    target: str
    read: Reader
    note: str = ""

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return f"`{self.target}`" + (f"; {self.note}" if self.note else "")

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Reads and writes the value."""
        draft.put(self.target, self.read(value), key=key)
        draft.note("assumed" if self.note else "converted", key, self.note, target=self.target)


@dataclass(frozen=True)
class Choice:
    """Words go to words of a recipe key; a pair is a word and what differs."""

    target: str
    words: Mapping[str, Any]
    otherwise: str = ""

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return f"`{self.target}`"

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Looks the word up; an unknown one has no counterpart."""
        found = self.words.get(str(value).lower())
        if found is None:
            why = self.otherwise or f"`{self.target}` has no such choice"
            draft.note("no_counterpart", key, why)
            return
        is_pair = isinstance(found, tuple)
        chosen, note = cast("tuple[str, str]", found) if is_pair else (str(found), "")
        draft.put(self.target, chosen, key=key)
        draft.note("assumed" if note else "converted", key, note, target=self.target)


@dataclass(frozen=True)
class Part:
    """Read together with other keys by the tool's ``assemble``; ``target`` is where it shows."""

    target: str

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return ", ".join(f"`{name}`" for name in self.target.split(", "))

    def apply(self, draft: Draft, key: str, value: Any) -> None:  # noqa: ARG002
        """Leaves the key to ``assemble``; see `Draft.settle`."""
        draft.parts[key] = self.target


@dataclass(frozen=True)
class Always:
    """Nothing to write: fsdpq does so anyway, or has no need of it."""

    why: str

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return f"not needed: {self.why}"

    def apply(self, draft: Draft, key: str, value: Any) -> None:  # noqa: ARG002
        """Reports the key."""
        draft.note("built_in", key, self.why)


@dataclass(frozen=True)
class Lost:
    """No counterpart; a value that asks for nothing loses nothing."""

    why: str

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return f"no counterpart: {self.why}"

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Reports the key unless it asks for nothing."""
        if is_off(value):
            draft.note("built_in", key, "asks for nothing")
        else:
            draft.note("no_counterpart", key, self.why)


@dataclass(frozen=True)
class With:
    """A function of the tool reads the value and reports it.

    Attributes:
        target: recipe keys, comma-separated, for the documentation.
        function: takes the draft, the key and the value.
        entries: what becomes of the keys of its entries where the value is a list of mappings.
    """

    target: str
    function: Callable[[Draft, str, Any], None]
    entries: Table | None = None

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        names = ", ".join(f"`{name}`" for name in self.target.split(", ") if name)
        return names or "reported, by its value"

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Calls the function."""
        self.function(draft, key, value)


@dataclass(frozen=True)
class Table:
    """The keys of one mapping of the source.

    Attributes:
        rules: key -> what becomes of it.
        known: further keys that the tool reads, and for which fsdpq has nothing.
        reasons: prefix of such a key -> why.
        unknown: what the tool does with a key that it does not know.
        strip: a prefix that the tool takes off the keys before it reads them.
    """

    rules: Mapping[str, Rule]
    known: Collection[str]
    unknown: str
    reasons: Mapping[str, str]
    strip: str = ""

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return "see its keys below"

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Handles every key of the mapping ``value`` at the dotted ``key`` (empty: the root)."""
        for name, item in mapping(value).items():
            path = f"{key}.{name}" if key else name
            bare = name.removeprefix(self.strip) if name not in self.rules else name
            rule = self.rules.get(bare)
            if rule is None and bare not in self.known:
                draft.note("dropped", path, self._explain(name, bare))
            elif item is None:
                draft.note("built_in", path, "not set")
            elif rule is None:
                Lost(self._reason(bare)).apply(draft, path, item)
            else:
                try:
                    rule.apply(draft, path, item)
                except UnusableError as error:
                    draft.note("unusable", path, f"`{path}` {error}")

    def _reason(self, name: str) -> str:
        for prefix, reason in self.reasons.items():
            if name.startswith(prefix):
                return reason
        return NOTHING_LIKE_IT

    def _explain(self, name: str, bare: str) -> str:
        guess = _RENAMED.get(bare) or suggest(bare, [*self.rules, *sorted(self.known)])
        return self.unknown + (f"; did you mean `{guess}`?" if guess and guess != name else "")
