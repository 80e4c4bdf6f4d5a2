"""Where every value of a run was written: kept in its lock, shown in its report.

A value that nobody wrote is a default and has no entry. A run that goes on, or that is done again,
has its recipe from a lock: what that says about a value counts, unless the command line gave
another one.
"""

from __future__ import annotations

from fsdpq.recipe.compose import COMMAND_LINE
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.view import View

AUTO = "auto"
"""Source of what ``auto`` became, for this machine and this recipe."""

SMOKE = "smoke run"
"""Source of what a smoke run makes smaller."""


def describe_sources(
    loaded: LoadedRecipe, resolved: Recipe, *, smoke: bool = False
) -> dict[str, str]:
    """Returns dotted key -> where its value was written, of those that are no defaults.

    Args:
        loaded: the recipe as given.
        resolved: what it became on this machine.
        smoke: whether it was shrunk.
    """
    given = View(loaded.path, loaded.path, loaded.recipe, loaded.marks)
    before = given.values()
    found: dict[str, str] = {}
    for path, value in View(loaded.path, loaded.path, resolved, loaded.marks).values().items():
        key = ".".join(str(part) for part in path)
        place = given.origin(path)
        recorded = loaded.recorded_sources
        if path not in before or before[path] != value:
            known = None if recorded is None else recorded.get(key)
            shrunk = smoke and before.get(path) != AUTO
            found[key] = known or (SMOKE if shrunk else AUTO)
        elif recorded is not None and (place is None or place.source != COMMAND_LINE):
            found |= {key: recorded[key]} if key in recorded else {}
        elif place is not None:
            found[key] = given.source(path)
    return found
