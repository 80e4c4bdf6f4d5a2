"""Reading a command of fsdp_qlora: a shell script, a paste out of its README, or words.

Nothing is run and no variable is expanded. The README's own commands have comments after the
backslash at the end of a line, and one lacks a backslash in the middle; both are read as meant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.errors import Location, Problem, UsageError
from fsdpq.recipe.compose import COMMAND_LINE
from fsdpq.recipe.source import Marks, Source

MAX_BYTES = 256 * 1024
_SCRIPT = re.compile(r"(?:^|[\s/;&])train\.py(?:\s|$)")
_COMMENT = re.compile(r"(?:^|\s)#.*$")
TAKEN_AS_MEANT = "it is taken as meant"
"""Hint of a Problem that did not keep a flag from being read."""
_HINT = "put the command (`python train.py --train_type qlora ...`) into a file, or after `--`"


@dataclass
class _Command:
    """One command: its words, each with the line that it is on."""

    words: list[tuple[str, Location]] = field(default_factory=list[tuple[str, Location]])
    problems: list[Problem] = field(default_factory=list[Problem])


def read_command_file(path: Path, known: Collection[str]) -> Source:
    """Returns the flags of the one command in ``path``; without ``train.py`` one must be known.

    Raises:
        UsageError: there is no such file, or no command, or more than one.
    """
    raw = _read(path)
    lines = raw.decode("utf-8", errors="replace").splitlines()
    commands = [found for found in _commands(str(path), lines) if _is_meant(found.words, known)]
    if not commands:
        raise UsageError(f"`{path}` holds no command of fsdp_qlora", hint=_HINT)
    if len(commands) > 1:
        places = ", ".join(str(command.words[0][1].line) for command in commands[:9])
        message = f"`{path}` holds {len(commands)} commands, on lines {places}"
        raise UsageError(message, hint="leave one of them in it, or give one after `--`")
    return _source(path, raw, commands[0])


def read_words(words: Sequence[str], known: Collection[str]) -> Source:
    """Returns the flags of a command that the shell has split into ``words`` already.

    Raises:
        UsageError: they are no such command.
    """
    line = Location(COMMAND_LINE)
    command = _Command([(word, line) for word in words])
    if not _is_meant(command.words, known):
        raise UsageError("no command of fsdp_qlora was given", hint=_HINT)
    return _source(Path(COMMAND_LINE), b"", command)


def _is_meant(words: Sequence[tuple[str, Location]], known: Collection[str]) -> bool:
    keys = {word.removeprefix("--").partition("=")[0] for word, _ in words if word[:2] == "--"}
    return not keys.isdisjoint(known) or any(word.endswith("train.py") for word, _ in words)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "name a file that holds the command"
        raise UsageError(f"`{path}` cannot be read: {reason}", hint=hint) from None
    if len(raw) > MAX_BYTES:
        message = f"`{path}` is larger than {MAX_BYTES // 1024} KiB: that is no command"
        raise UsageError(message, hint=_HINT)
    return raw


def _commands(source: str, lines: Sequence[str]) -> Iterator[_Command]:
    """Yields every command of ``train.py``; a line of flags alone goes on with the last one."""
    current: _Command | None = None
    goes_on = False
    for index, line in enumerate(lines, start=1):
        text = _COMMENT.sub("", line).strip()
        ends_open = text.endswith("\\")
        text = text.rstrip("\\").strip()
        is_start = _SCRIPT.search(text) is not None
        is_flags = text.startswith("--")
        if is_start or (is_flags and current is None):
            if current is not None:
                yield current
            current = _Command()
        elif not goes_on and not (is_flags and current is not None):
            continue
        assert current is not None  # noqa: S101  a line goes on only after one that began
        words = _words(source, index, line, text, current)
        if not goes_on and not is_start and is_flags and current.words:
            current.problems += [_cut_off(word, place) for word, place in words if word[:2] == "--"]
        current.words += words
        goes_on = ends_open
    if current is not None:
        yield current


def _words(
    source: str, line: int, full: str, text: str, command: _Command
) -> list[tuple[str, Location]]:
    try:
        words = shlex.split(text)
    except ValueError:
        place = Location(source, line, 1, full, len(full.rstrip()))
        command.problems.append(Problem("a quote is not closed", "", place, "close it"))
        words = text.split()
    found: list[tuple[str, Location]] = []
    end = 0
    for word in words:
        start = full.find(word, end)
        end = max(end, start + len(word))
        found.append((word, Location(source, line, max(0, start) + 1, full, max(1, len(word)))))
    return found


def _cut_off(word: str, place: Location) -> Problem:
    key = word.removeprefix("--").partition("=")[0]
    message = "the line above ends without `\\`: no shell would have passed this on"
    return Problem(message, key, place, TAKEN_AS_MEANT)


def _source(path: Path, raw: bytes, command: _Command) -> Source:
    data: dict[str, Any] = {}
    marks = Marks()
    words = command.words
    starts = [index for index, (word, _) in enumerate(words) if word.endswith("train.py")]
    flags = words[starts[0] + 1 :] if starts else words
    key = ""
    for word, place in flags:
        if word.startswith("--"):
            key, has_value, value = word.removeprefix("--").partition("=")
            data[key] = value if has_value else True
            marks.keys[(key,)] = marks.values[(key,)] = place
        elif key and data[key] is True:
            data[key] = word
            marks.values[(key,)] = place
        else:
            problem = Problem(f"`{word}` belongs to no flag", "", place, "delete it")
            command.problems.append(problem)
    for name in [name for name, value in data.items() if "$" in str(value)]:
        message = f"`{data.pop(name)}` is a variable of the shell, whose value is not known here"
        place = marks.values[(name,)]
        command.problems.append(Problem(message, name, place, "write the value"))
    lines = raw.decode("utf-8", "replace").splitlines()
    return Source(path, raw, lines, data, marks, command.problems)
