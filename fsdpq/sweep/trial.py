"""One variant of a recipe, with an id that stays the same whenever it is asked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.recipe.root import Recipe

ID_LENGTH = 8
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
        return ", ".join(f"{key}={_short(value)}" for key, value in self.settings.items())


def trial_id(recipe: Recipe, *, base_dir: Path, smoke: bool = False) -> str:
    """Returns the id of the trial that trains ``recipe``: equal recipes, equal ids.

    Args:
        recipe: complete, not resolved for a machine.
        base_dir: what its relative paths start from.
        smoke: whether it is only tried (``--smoke``).
    """
    values = recipe.model_dump(mode="json", exclude=set(NOT_PART_OF_A_TRIAL))
    content = json.dumps([values, str(base_dir.absolute()), smoke], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
