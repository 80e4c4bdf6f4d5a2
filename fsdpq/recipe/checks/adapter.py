"""Rules about ``adapter``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, layer_linears, matches
from fsdpq.recipe.checks.quantization import repeated
from fsdpq.recipe.describe import list_words
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions, LlamaProOptions, LoraOptions

TARGETS = "adapter.target_modules"
ROUNDING = 0.01
"""How far ``expansion_rate`` times the layers may lie from a whole number: 0.3333 means a third."""

DORA_NOTICEABLE = 0.05
"""DoRA's extra work as a share of LoRA's, from which it is worth a line."""


def check_targets_not_empty(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """An empty list of adapted modules: nothing would be trained."""
    if isinstance(recipe.adapter, LoraOptions) and recipe.adapter.target_modules == ():
        message = "`adapter.target_modules` is empty: nothing would be trained"
        yield Problem(message, TARGETS, hint="write `all-linear` or some names")


def check_targets_differ(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A name that ``target_modules`` holds twice."""
    if isinstance(recipe.adapter, LoraOptions) and recipe.adapter.target_modules != "all-linear":
        yield from repeated(tuple(recipe.adapter.target_modules), TARGETS)


def check_targets_exist(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A name in ``target_modules`` that no linear layer of the model ends in."""
    card, adapter = card_of(recipe, base_dir), recipe.adapter
    if card is None or not isinstance(adapter, LoraOptions):
        return
    shapes = layer_linears(card)
    for name in () if adapter.target_modules == "all-linear" else adapter.target_modules:
        if not any(matches(shape.name, name) for shape in shapes):
            message = f"`{TARGETS}`: the model's layers have no linear layer `{name}`"
            hint = f"they have {list_words((shape.name for shape in shapes), 'and')}"
            yield Problem(message, TARGETS, hint=hint)


def check_new_layers_given(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """llama_pro with both or neither of ``num_new_layers`` and ``expansion_rate``."""
    if not isinstance(recipe.adapter, LlamaProOptions):
        return
    given = (recipe.adapter.num_new_layers, recipe.adapter.expansion_rate)
    if given == (None, None):
        message = "`adapter` needs `num_new_layers` or `expansion_rate`"
        yield Problem(message, "adapter", hint="add `num_new_layers: 4`")
    elif None not in given:
        message = "`adapter` has both `num_new_layers` and `expansion_rate`"
        yield Problem(message, "adapter.expansion_rate", hint="delete one of them")


def check_new_layers_divide(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """llama_pro with new layers that cannot be spread evenly over the model's."""
    card, adapter = card_of(recipe, base_dir), recipe.adapter
    if card is None or not isinstance(adapter, LlamaProOptions):
        return
    layers, key, wanted = card.num_layers, "num_new_layers", float(adapter.num_new_layers or 0)
    if adapter.num_new_layers is None:
        if adapter.expansion_rate is None:
            return
        key, wanted = "expansion_rate", adapter.expansion_rate * layers
    new = round(wanted)
    if new >= 1 and abs(wanted - new) <= ROUNDING and layers % new == 0:
        return
    divisors = [n for n in range(1, layers + 1) if layers % n == 0]
    known = divisors if key == "num_new_layers" else [f"{n / layers:.4g}" for n in divisors]
    message = f"`adapter.{key}` is {getattr(adapter, key)}, which does not spread new layers"
    message += f" evenly over the model's {layers}"
    hint = f"use {list_words(map(str, known))}"
    yield Problem(message, f"adapter.{key}", hint=hint)


def check_dora_magnitude_moves(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Trained weights of dora in bf16, where its magnitudes are too coarse to ever move."""
    precision = recipe.fsdp.precision
    if isinstance(recipe.adapter, DoraOptions) and precision in ("bf16", "bf16_buffers_autocast"):
        message = f"`fsdp.precision: {precision}` keeps trained weights in bf16, where the "
        message += "magnitudes of dora are too coarse to move"
        hint = "delete it: `auto` keeps them in fp32 and computes in bf16"
        yield Problem(message, "fsdp.precision", hint=hint)


def note_dora_cost(recipe: Recipe, _base_dir: Path) -> Iterator[str]:
    """DoRA's work beside LoRA's, where its rank is large for the tokens that a rank computes.

    The norm of ``W + BA`` needs ``W A^T``, which costs what ``rank`` more tokens would.
    """
    if not isinstance(recipe.adapter, DoraOptions):
        return
    rank, training = recipe.adapter.rank, recipe.training
    tokens = training.micro_batch_size // training.layer_chunks * recipe.data.seq_len
    if rank >= DORA_NOTICEABLE * max(1, tokens):
        yield (
            f"dora computes every adapted layer for {rank} more tokens than lora would, beside the "
            f"{tokens} of a micro-batch: raise `training.micro_batch_size` or `data.seq_len`, or "
            "lower `adapter.rank`, to make that small"
        )


CHECKS = (
    check_targets_not_empty,
    check_targets_differ,
    check_targets_exist,
    check_new_layers_given,
    check_new_layers_divide,
    check_dora_magnitude_moves,
)
NOTICES = (note_dora_cost,)
