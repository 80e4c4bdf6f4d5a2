"""``defaults``: base fragments below a recipe, one level deep, later ones over earlier ones.

The order is Hydra's (``defaults`` first, the recipe's own keys last; mappings are merged, lists and
values replaced), and a test composes the same files by ``hydra.compose`` and compares. Hydra itself
does not read recipes: its ``searchpath`` imports packages, its loader follows YAML 1.1 and builds
what aliases expand to, its state is global, and its errors have no lines. Here the plain data of
`fsdpq.recipe.source` is merged together with its marks, so every value knows its file and line.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import Location, Problem, RecipeError, UsageError
from fsdpq.recipe.describe import Section, list_words, suggest
from fsdpq.recipe.marks import KeyPath, Marks
from fsdpq.recipe.shipped import shipped_fragments
from fsdpq.recipe.source import Source, read_source

MAX_FRAGMENTS = 20
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass
class Composition:
    """A recipe on its way from files to one plain document.

    Attributes:
        data: the document so far.
        marks: where its keys and values were written.
        problems: mistakes found on the way.
        notices: what happened and is no mistake, for people.
        sources: the files, fragments first.
    """

    data: dict[str, Any]
    marks: Marks
    problems: list[Problem]
    notices: list[str] = field(default_factory=list[str])
    sources: list[Source] = field(default_factory=list[Source])


def compose_layers(source: Source, sections: dict[str, Section]) -> Composition:
    """Returns the recipe ``source`` over the fragments that its ``defaults`` name."""
    composed = Composition({}, Marks(), list(source.problems))
    entries: Any = source.data.pop("defaults", ())
    for place, path in _find_fragments(entries, source, composed.problems):
        fragment = _read_fragment(path, place, composed.problems)
        if fragment is not None:
            _merge_layer(composed, fragment, sections)
    _merge_layer(composed, source, sections)
    composed.marks.forget(("defaults",))
    return composed


def copy_composition(composed: Composition) -> Composition:
    """Returns a copy that shares nothing that changes with ``composed``."""
    marks = Marks(dict(composed.marks.keys), dict(composed.marks.values))
    return Composition(
        copy.deepcopy(composed.data),
        marks,
        list(composed.problems),
        list(composed.notices),
        list(composed.sources),
    )


def drop_other_kind(entry: dict[str, Any], kind: Any, section: Section | None) -> tuple[str, ...]:
    """Removes from ``entry`` the keys that only its old kind knows, and returns them.

    A key that neither kind knows stays, to be reported.
    """
    old = section.options(entry) if section else None
    new = section.kinds.get(kind) if section and isinstance(kind, str) else None
    if old is None or new is None:
        return ()
    dropped = tuple(k for k in entry if k in old.model_fields and k not in new.model_fields)
    for key in dropped:
        del entry[key]
    return dropped


def describe_drop(setting: str, section: str, dropped: tuple[str, ...], marks: Marks) -> str:
    """Returns the notice for keys that left with their kind: names and places."""
    named = [f"`{key}`{_place(marks.key((section, key)))}" for key in dropped]
    listed = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
    return f"{setting} drops {listed}"


def _place(location: Location | None) -> str:
    return f" ({location.source}:{location.line})" if location and location.line else ""


def _merge_layer(composed: Composition, layer: Source, sections: dict[str, Section]) -> None:
    """Merges ``layer`` over what is composed, in place."""
    gone: set[KeyPath] = set()
    for name, value in layer.data.items():
        old = composed.data.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and "kind" in value:
            dropped = drop_other_kind(
                cast("dict[str, Any]", old), value["kind"], sections.get(name)
            )
            gone |= {(name, key) for key in dropped}
            if dropped:
                place = _place(layer.marks.value((name, "kind")))
                setting = f"`{name}.kind: {value['kind']}`{place}"
                notice = describe_drop(setting, name, dropped, composed.marks)
                composed.notices.append(notice)
    _merge(composed.data, layer.data, (), gone)
    for mine, theirs in (
        (composed.marks.keys, layer.marks.keys),
        (composed.marks.values, layer.marks.values),
    ):
        for path in [path for path in mine if any(path[: n + 1] in gone for n in range(len(path)))]:
            del mine[path]
        mine.update(theirs)
    composed.sources.append(layer)


def _merge(
    lower: dict[str, Any], upper: dict[str, Any], path: KeyPath, replaced: set[KeyPath]
) -> None:
    """Merges ``upper`` over ``lower``, in place; notes the paths that were replaced as a whole."""
    for key, value in upper.items():
        old = lower.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(
                cast("dict[str, Any]", old), cast("dict[str, Any]", value), (*path, key), replaced
            )
        else:
            replaced.add((*path, key))
            lower[key] = value


def _find_fragments(
    entries: Any, source: Source, problems: list[Problem]
) -> Iterator[tuple[Location | None, Path]]:
    """Yields the place and the file of every fragment; what is no fragment becomes a Problem."""
    hint = f"write a list of names: {list_words(shipped_fragments())}, or `./file.yaml`"
    if entries == ():
        return
    if not isinstance(entries, list):
        location = source.marks.value(("defaults",))
        problems.append(Problem("`defaults` is a list of fragments", "defaults", location, hint))
        return
    entries = cast("list[Any]", entries)
    for i, entry in enumerate(entries):
        location = source.marks.value(("defaults", i))
        found = _find_fragment(entry, source, hint)
        if isinstance(found, Path) and entry in entries[:i]:
            found = (f"`defaults` names `{entry}` twice", "delete one of them")
        if isinstance(found, Path) and i >= MAX_FRAGMENTS:
            found = (f"`defaults` names more than {MAX_FRAGMENTS} fragments", "merge some")
        if isinstance(found, Path):
            yield location, found
        else:
            message, advice = found
            problems.append(Problem(message, f"defaults.{i}", location, advice))


def _find_fragment(entry: Any, source: Source, hint: str) -> Path | tuple[str, str]:
    """Returns the file of an entry of ``defaults``, or what is wrong with it and what to do."""
    if not isinstance(entry, str):
        return "an entry of `defaults` is a name", hint
    if entry == "_self_":
        return "`_self_` is not needed: the recipe's own keys always win", "delete it"
    if _REMOTE.match(entry):
        return f"`{entry}` is not on this machine: fragments are local files", hint
    if "/" not in entry and not entry.endswith((".yaml", ".yml")):
        known = shipped_fragments()
        if entry in known:
            return _shown(known[entry])
        guess = suggest(entry, known)
        return f"there is no fragment `{entry}`", f"did you mean `{guess}`?" if guess else hint
    base = source.path.parent
    path = base / entry
    try:
        inside = path.resolve().is_relative_to(base.resolve())
        exists = inside and path.is_file()
    except (OSError, ValueError, RuntimeError):
        inside, exists = True, False
    if not inside or entry.startswith("~"):
        advice = "copy it beside the recipe: `./name.yaml`"
        return f"`{entry}` is not in the recipe's directory", advice
    if not exists:
        return f"there is no fragment `{path}`", "a file beside the recipe is `./name.yaml`"
    return path


def _shown(path: Path) -> Path:
    """Returns ``path`` as messages show it: relative where it lies below this directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _read_fragment(path: Path, place: Location | None, problems: list[Problem]) -> Source | None:
    try:
        fragment = read_source(path, what="fragment")
    except UsageError as error:
        problems.append(Problem(error.message, "defaults", place, error.hint))
        return None
    except RecipeError as error:
        problems += error.problems
        return None
    problems += fragment.problems
    if "defaults" in fragment.data:
        del fragment.data["defaults"]
        message = "a fragment has no `defaults` of its own: one level is all there is"
        hint = "name its fragments in the recipe"
        location = fragment.marks.key(("defaults",))
        problems.append(Problem(message, "defaults", location, hint))
    return fragment
