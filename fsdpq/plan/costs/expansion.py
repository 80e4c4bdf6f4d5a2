"""Which layer of the checkpoint every layer of a model that ``llama_pro`` expands starts from."""

from __future__ import annotations

from typing import NoReturn

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.adapter import LlamaProOptions


def layer_sources(options: LlamaProOptions, num_layers: int) -> tuple[int, ...]:
    """Returns the base's layer of each layer: ``(0, 1, 1, 2, 3, 3)`` for 2 new ones in 4.

    Raises:
        RecipeError: the new layers cannot be spread evenly.
    """
    group = num_layers // _num_new(options, num_layers)
    last_of_group = range(group - 1, num_layers, group)
    return tuple(sorted([*range(num_layers), *last_of_group]))


def _num_new(options: LlamaProOptions, num_layers: int) -> int:
    key, wanted = "num_new_layers", float(options.num_new_layers or 0)
    if options.expansion_rate is not None:
        key, wanted = "expansion_rate", options.expansion_rate * num_layers
    num_new = round(wanted)
    if num_new < 1 or abs(wanted - num_new) > 0.01 or num_layers % num_new:
        _refuse(options, key, num_layers)
    return num_new


def _refuse(options: LlamaProOptions, key: str, num_layers: int) -> NoReturn:
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    known = divisors if key == "num_new_layers" else [f"{n / num_layers:.4g}" for n in divisors]
    problem = Problem(
        f"`adapter.{key}` is {getattr(options, key)}, which does not spread new layers "
        f"evenly over the model's {num_layers}",
        f"adapter.{key}",
        hint=f"use one of {', '.join(map(str, known))}",
    )
    raise RecipeError([problem])
