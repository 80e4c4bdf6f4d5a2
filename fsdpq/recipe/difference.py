"""What differs between two resolved recipes: ``fsdpq diff``, and why a run cannot go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fsdpq.recipe.explain import value_text
from fsdpq.recipe.view import View


@dataclass(frozen=True)
class Side:
    """One recipe's value of a key; a key of another kind is not there (``present`` is False)."""

    present: bool
    value: Any = None
    source: str = ""


@dataclass(frozen=True)
class Difference:
    """A key whose value differs, or that only one of two recipes has."""

    key: str
    old: Side
    new: Side


def compare(old: View, new: View) -> Iterator[Difference]:
    """Yields every key that differs, in the order of the recipe; keys of one kind only come last.

    A list is one value, but parts of a mixture are compared one by one. Where ``kind`` differs, the
    keys of the two kinds differ as well.
    """
    values = (old.values(), new.values())
    both = [path for path in values[0] if path in values[1]]
    rest = [path for path in values[0] if path not in values[1]]
    rest += [path for path in values[1] if path not in values[0]]
    order = {str(name): place for place, name in enumerate(type(old.recipe).model_fields)}
    for path in sorted([*both, *rest], key=lambda path: order[str(path[0])]):
        sides = [
            Side(True, table[path], view.source(path)) if path in table else Side(False)
            for view, table in zip((old, new), values, strict=True)
        ]
        if sides[0].present != sides[1].present or sides[0].value != sides[1].value:
            yield Difference(".".join(str(part) for part in path), *sides)


def diff_lines(found: Iterable[Difference]) -> Iterator[str]:
    """Yields the lines of a diff: each key, and both values with where they were written."""
    for entry in found:
        yield ""
        yield entry.key
        sides = [("-", *_cells(entry.old)), ("+", *_cells(entry.new))]
        width = max(len(value) for _, value, _ in sides)
        yield from (f"  {mark}  {value:<{width}}  {place}".rstrip() for mark, value, place in sides)


def _cells(side: Side) -> tuple[str, str]:
    if not side.present:
        return "(has no such key)", ""
    return value_text(side.value) or '""', side.source
