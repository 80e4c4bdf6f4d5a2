"""A model with what it is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq.recipe.root import Recipe
from fsdpq.worker.assemble import Assembled


@dataclass(frozen=True)
class Subject:
    """A model with what it is measured by.

    Attributes:
        recipe: resolved.
        assembled: sharded and loaded.
        tokenizer: of the base.
        model_dir: of the base.
        device: this rank's.
        include_path: folder of tasks that the user named, None for none.
    """

    recipe: Recipe
    assembled: Assembled
    tokenizer: PreTrainedTokenizerBase
    model_dir: Path
    device: torch.device
    include_path: Path | None = None
