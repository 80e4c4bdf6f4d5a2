"""What several checks ask of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.cards.card import LinearShape, ModelCard
from fsdpq.cards.find import card_from_config, find_card
from fsdpq.errors import Problem
from fsdpq.recipe.describe import show_value
from fsdpq.recipe.options import Options
from fsdpq.recipe.precision import Dtype, compute_dtype
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.source import SourceOptions


def model_directory(recipe: Recipe, base_dir: Path) -> Path | None:
    """Returns the model's directory, None where its name is no directory of this machine."""
    try:
        directory = base_dir / Path(recipe.model.name_or_path).expanduser()
        return directory if directory.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def card_of(recipe: Recipe, base_dir: Path) -> ModelCard | None:
    """Returns the model's card: of its directory, else of the table; None where neither has it."""
    directory = model_directory(recipe, base_dir)
    if directory is not None:
        return card_from_config(directory)
    return find_card(recipe.model.name_or_path)


def num_ranks(recipe: Recipe) -> int | None:
    """Returns the ranks of the run, None where the machine decides."""
    if recipe.launch.nproc_per_node == "auto":
        return None
    return recipe.launch.nproc_per_node * recipe.launch.max_nodes


def told_dtype(recipe: Recipe) -> Dtype | None:
    """Returns the dtype that the recipe computes in, None where the machine decides."""
    return compute_dtype(recipe)


def precision_key(recipe: Recipe, part: str) -> str:
    """Returns the key that says ``part`` of the precision: the preset's, or one of a mapping."""
    chosen = recipe.fsdp.precision
    return "fsdp.precision" if isinstance(chosen, str) else f"fsdp.precision.{part}"


def sources_of(recipe: Recipe) -> Iterator[tuple[str, SourceOptions]]:
    """Yields every source of rows with its key: ``data``, a mixture's parts, the evaluation's."""
    yield "data", recipe.data
    for index, part in enumerate(recipe.data.mixture):
        yield f"data.mixture.{index}", part
    if recipe.data.eval is not None:
        yield "data.eval", recipe.data.eval


def is_default(options: Options, field: str) -> bool:
    """Whether ``field`` has the value that it would have without being given."""
    info = type(options).model_fields[field]
    return bool(getattr(options, field) == info.get_default(call_default_factory=True))


def has_no_effect(
    recipe: Recipe, section: str, field: str, reason: str, hint: str = ""
) -> Iterator[Problem]:
    """Yields a Problem where ``section.field`` is given, because nothing reads it."""
    if not is_default(getattr(recipe, section), field):
        key, value = f"{section}.{field}", show_value(getattr(getattr(recipe, section), field))
        message = f"`{key}: {value}` has no effect {reason}"
        yield Problem(message, key, hint=hint or f"delete `{field}`")


def layer_linears(card: ModelCard) -> list[LinearShape]:
    """Returns the linear layers that can be quantized and adapted: experts' stacks are none."""
    routers = ("mlp.gate",) if card.num_experts else ()
    return [s for s in card.linear_shapes if s.count == 1 and s.name not in routers]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the last parts of the dotted ``name``."""
    return name == pattern or name.endswith(f".{pattern}")
