"""The tensors of a model in a directory on this machine. Weights are not read, only headers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fsdpq.cards.find import card_from_config
from fsdpq.errors import CheckpointError
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.from_card import shape_from_card


def shape_from_directory(directory: Path) -> ModelShape:
    """Returns the shape of the checkpoint in ``directory``.

    Raises:
        CheckpointError: it cannot be told; says why.
    """
    card = card_from_config(directory)
    if card is None:
        raise CheckpointError(
            f"the shape of `{directory}` cannot be told from its config.json",
            hint="name a directory with the config.json of a causal language model",
        )
    return dataclasses.replace(shape_from_card(card), source="config")
