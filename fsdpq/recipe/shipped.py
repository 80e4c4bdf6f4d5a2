"""Finding the recipes that come with fsdpq, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def shipped_recipes() -> Path:
    """Returns the directory of the shipped recipes; its ``base/`` holds the fragments.

    A wheel carries it inside the package (``fsdpq/_shipped/recipes``, see ``pyproject.toml``); in a
    checkout it lies beside the package.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_fragments() -> dict[str, Path]:
    """Returns the shipped fragments by the name that ``defaults`` knows them by."""
    return {path.stem: path for path in sorted((shipped_recipes() / "base").glob("*.yaml"))}
