"""Finds the shape of the model that a recipe names, on this machine and without a network."""

from __future__ import annotations

from pathlib import Path

from fsdpq.cards.find import find_card
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.shapes.from_directory import shape_from_directory


def find_shape(name_or_path: str, base_dir: Path) -> ModelShape | None:
    """Returns the shape of ``model.name_or_path``: of a directory, else of a card.

    Args:
        name_or_path: as the recipe has it.
        base_dir: what a relative directory is relative to.

    Returns:
        None where it is no directory and no card has its name: the hub may know it.

    Raises:
        CheckpointError: it is a directory whose shape cannot be told; says why.
    """
    directory = base_dir / Path(name_or_path).expanduser()
    if directory.is_dir():
        return shape_from_directory(directory)
    card = find_card(name_or_path)
    return None if card is None else shape_from_card(card)
