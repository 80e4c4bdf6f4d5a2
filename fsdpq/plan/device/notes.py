"""What a reader should know about planned device memory."""

from __future__ import annotations

from collections.abc import Iterator

from fsdpq.plan.shape import ModelShape
from fsdpq.recipe.root import Recipe

OWN_MASKS = ("falcon",)
"""Architectures whose attention makes masks of its own, of all pairs of tokens."""


def device_notes(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """Yields one sentence for each thing that the arithmetic leaves out."""
    if recipe.training.compile:
        yield "memory is planned for layers that are not compiled; compiled ones took 1 to 3% less"
    if shape.model_type in OWN_MASKS:
        yield (
            f"attention of `{shape.model_type}` makes masks of all pairs of tokens, which are not "
            "planned: long rows take more"
        )
