"""Where the recipes that come with fsdpq lie: in a checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

import fsdpq
from fsdpq.errors import EnvironmentProblemError

_PACKAGE = Path(fsdpq.__file__).parent
_PLACES = (_PACKAGE.parent / "recipes", _PACKAGE / "_shipped" / "recipes")


def shipped_dir() -> Path:
    """Returns the directory of the shipped recipes; its ``base`` holds the fragments.

    Raises:
        EnvironmentProblemError: the installation lacks them.
    """
    for place in _PLACES:
        if (place / "quickstart.yaml").is_file():
            return place
    hint = "install fsdpq again"
    raise EnvironmentProblemError(f"there are no recipes in `{_PLACES[1]}`", hint=hint)


def shipped_recipes() -> dict[str, Path]:
    """Returns the path of every shipped recipe by its name, sorted; fragments are left out."""
    return {path.stem: path for path in sorted(shipped_dir().glob("*.yaml"))}
