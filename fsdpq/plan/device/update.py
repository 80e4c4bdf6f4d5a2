"""Working memory of the optimizer's step, beside its states and the gradients."""

from __future__ import annotations

from fsdpq.plan.weights import Weights
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import AdadeltaOptions, SgdOptions


def step_bytes(recipe: Recipe, weights: Weights) -> int:
    """Returns what a step takes at the most.

    AdamW and Adam are fused: nothing. Others work on lists of all tensors: torch's SGD makes
    gradients with weight decay anew, its Adadelta makes two lists as large as the weights.
    """
    trained = weights.shard.trained
    match recipe.optimizer:
        case SgdOptions(weight_decay=decay):
            return trained if decay else 0
        case AdadeltaOptions(weight_decay=decay) if recipe.launch.device == "cuda":
            return trained * (3 if decay else 2)
        case _:
            return 0
