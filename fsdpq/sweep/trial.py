"""One variant of a recipe, with an id that stays the same whenever it is asked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.recipe.root import Recipe
from fsdpq.recipe.safety import relative_paths

ID_LENGTH = 10
NOT_PART_OF_A_TRIAL = ("name", "description")
"""Keys that say nothing about what a trial does."""


@dataclass(frozen=True)
class Trial:
    """A recipe to train, and what makes it differ from the others of its sweep.

    Attributes:
        id: `trial_id` of its recipe.
        recipe: validated and complete; not resolved for a machine.
        settings: what the sweep varies, dotted key -> value: ``{"adapter.rank": 8}``. A choice
            among recipe files is the key ``recipe``, a choice among kinds the key of its section.
        overrides: the same in the words of the command line: ``adapter.rank=8``.
        source: the recipe's file.
        base_dir: what relative paths of the recipe start from.
    """

    id: str
    recipe: Recipe
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    overrides: tuple[str, ...] = ()
    source: Path = Path()
    base_dir: Path = Path()

    @property
    def label(self) -> str:
        """What differs, in one line: ``adapter.rank=8, optimizer.lr=1e-4``."""
        return label_settings(self.settings)


def label_settings(settings: Mapping[str, Any]) -> str:
    """Returns settings in one line, see `Trial.label`."""
    return ", ".join(f"{key}={_short(value)}" for key, value in settings.items())


def trial_id(recipe: Recipe, *, base_dir: Path, smoke: bool = False) -> str:
    """Returns the id of the trial that trains ``recipe``: equal recipes, equal ids.

    Defaults do not count, so that a key that a later version adds changes no id; and the directory
    counts only where a path starts from it, so that a recipe of public data has the same id on
    every machine.

    Args:
        recipe: complete, not resolved for a machine.
        base_dir: what its relative paths start from.
        smoke: whether it is only tried (``--smoke``).
    """
    values = recipe.model_dump(mode="json", exclude=set(NOT_PART_OF_A_TRIAL), exclude_defaults=True)
    has_paths = next(relative_paths(recipe, base_dir), None) is not None
    place = str(base_dir.absolute()) if has_paths else ""
    content = json.dumps([values, place, smoke], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
