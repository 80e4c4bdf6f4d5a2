"""What a recipe can say and this version cannot do: refused with a Problem, never ignored.

The recipe's vocabulary is complete from the start, so that recipes written now stay valid; what
reads a setting comes room by room. Whoever makes a setting work deletes its line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fsdpq.errors import Problem
from fsdpq.recipe.options import Options

IMPLEMENTED: dict[str, tuple[Any, ...]] = {}
"""Keys of which some values do not work yet -> the values that do."""


def check_implemented(recipe: Options) -> Iterator[Problem]:
    """Yields a Problem for every setting of ``recipe`` that this version cannot do."""
    for key, values in IMPLEMENTED.items():
        section, field = key.split(".")
        value = getattr(getattr(recipe, section), field, values[0])
        if value in values:
            continue
        shown = value if isinstance(value, str | int) else "set"
        known = ", ".join(f"`{'null' if v is None else v}`" for v in values)
        hint = f"this version can do {known}" if known else f"delete `{key}`"
        yield Problem(f"`{key}: {shown}` does not work in this version yet", key, hint=hint)
