"""What a sweep names by patterns: recipe files, and the kinds of a section."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from fsdpq.errors import Location, Problem
from fsdpq.recipe.describe import Section, list_words
from fsdpq.sweep.choosing.grammar import Parameter, Patterns, parse_sweeps, write_patterns

MAX_RECIPES = 1000
ENDINGS = (".yaml", ".yml")


def find_recipes(
    named: str | Sequence[str], base_dir: Path, location: Location | None, *, besides: Path | None
) -> tuple[list[str], list[Problem]]:
    """Returns the recipe files that a sweep names, each once, relative to ``base_dir``.

    Args:
        named: files, or ``glob(...)``.
        base_dir: what they start from.
        location: where they were named.
        besides: the sweep itself, which no pattern finds.
    """
    names: dict[str, None] = {}
    problems: list[Problem] = []
    for entry in [named] if isinstance(named, str) else named:
        found, reason, hint = _find(entry, base_dir, besides)
        names |= dict.fromkeys(found)
        if reason:
            problems.append(Problem(reason, "recipe", location, hint))
    return list(names), problems


def move_recipes(named: str | Sequence[str], base_dir: Path, directory: Path) -> str | list[str]:
    """Returns what a sweep names as its recipes as a file in ``directory`` would name it."""
    if not isinstance(named, str):
        return [_move(entry, base_dir, directory) for entry in named]
    return _move(named, base_dir, directory)


def find_kinds(
    parameters: Sequence[Parameter], sections: dict[str, Section]
) -> tuple[list[Parameter], list[Problem]]:
    """Replaces ``quantization=glob(*)`` by the kinds of the section; other keys have no names."""
    found: list[Parameter] = []
    problems: list[Problem] = []
    for parameter in parameters:
        patterns, section = parameter.patterns, sections.get(parameter.key)
        if patterns is None:
            found.append(parameter)
            continue
        kinds = tuple(kind for kind in section.kinds if kind) if section else ()
        names = tuple(kind for kind in kinds if _matches(kind, patterns))
        found.append(replace(parameter, values=names, patterns=None))
        if not kinds:
            message = "`glob` finds recipe files and kinds of a section, not values of "
            message += f"`{parameter.key}`"
            problems.append(parameter.problem(message, "list the values: `a,b`"))
        elif not names:
            message = f"no kind of `{parameter.key}` is called so"
            problems.append(parameter.problem(message, f"there are {list_words(kinds, 'and')}"))
    return found, problems


def _find(entry: str, base_dir: Path, besides: Path | None) -> tuple[list[str], str, str]:
    """Returns the files that one entry names, or what is wrong with it and what to do."""
    if "://" in entry:
        return [], f"`{entry}` is not on this machine: recipes are local files", "give a path"
    if not entry.startswith("glob("):
        if (base_dir / entry).is_file():
            return [entry], "", ""
        hint = "check the path: it starts from the sweep's own directory"
        return [], f"there is no recipe `{base_dir / entry}`", hint if besides else "check the path"
    parsed, problems = parse_sweeps([("recipe", entry, None)])
    if problems:
        return [], problems[0].message, problems[0].hint
    patterns = parsed[0].patterns or Patterns(())
    if any("**" in pattern for pattern in patterns.include):
        return [], f"`{entry}` would look through whole directories", "leave the `**` out"
    names = sorted(
        {name for pattern in patterns.include for name in _files(pattern, base_dir)}
        - {name for name in _files("*", base_dir) if besides and name == besides.name}
    )
    names = [name for name in names if not _excluded(name, patterns)]
    if not names:
        hint = "a pattern is relative to the sweep's file" if besides else "check the pattern"
        return [], f"`{entry}` finds no recipe", hint
    if len(names) > MAX_RECIPES:
        message = f"`{entry}` finds {len(names)} recipes, more than {MAX_RECIPES}"
        return [], message, "name fewer"
    return names, "", ""


def _files(pattern: str, base_dir: Path) -> list[str]:
    path = Path(pattern)
    if path.is_absolute():
        root = Path(path.anchor)
        found = list(root.glob(path.relative_to(root).as_posix()))
    else:
        found = [file.relative_to(base_dir) for file in base_dir.glob(pattern)]
    return [file.as_posix() for file in found if file.suffix in ENDINGS]


def _excluded(name: str, patterns: Patterns) -> bool:
    return any(fnmatch(name, p) or fnmatch(Path(name).name, p) for p in patterns.exclude)


def _matches(name: str, patterns: Patterns) -> bool:
    included = any(fnmatch(name, pattern) for pattern in patterns.include)
    return included and not any(fnmatch(name, pattern) for pattern in patterns.exclude)


def _move(entry: str, base_dir: Path, directory: Path) -> str:
    if not entry.startswith("glob("):
        return _relative(entry, base_dir, directory)
    parsed, _ = parse_sweeps([("recipe", entry, None)])
    patterns = parsed[0].patterns or Patterns(())
    include = tuple(_relative(pattern, base_dir, directory) for pattern in patterns.include)
    return write_patterns(replace(patterns, include=include))


def _relative(name: str, base_dir: Path, directory: Path) -> str:
    if Path(name).is_absolute():
        return name
    start = os.path.relpath(base_dir.resolve(), directory.resolve())
    return (Path(start) / name).as_posix()
