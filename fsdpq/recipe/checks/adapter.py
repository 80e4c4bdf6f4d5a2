"""Rules about ``adapter``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, layer_linears, matches
from fsdpq.recipe.checks.quantization import repeated
from fsdpq.recipe.describe import list_words
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions, LlamaProOptions, LoraOptions

TARGETS = "adapter.target_modules"
SAVED = "adapter.modules_to_save"
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
    """A name that ``target_modules`` or ``modules_to_save`` holds twice, or that both hold."""
    adapter = recipe.adapter
    if not isinstance(adapter, LoraOptions):
        return
    targets = () if isinstance(adapter.target_modules, str) else adapter.target_modules
    yield from repeated(targets, TARGETS)
    yield from repeated(adapter.modules_to_save, SAVED)
    for name in sorted(set(targets) & set(adapter.modules_to_save)):
        message = f"`{SAVED}` names `{name}`, which `target_modules` names too: a module that is "
        yield Problem(f"{message}trained whole gets no adapter", SAVED, hint="delete one of them")


def check_target_pattern(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A pattern in ``target_modules`` that is no regular expression, or that only one word fits."""
    if not isinstance(recipe.adapter, LoraOptions):
        return
    pattern = recipe.adapter.target_modules
    if not isinstance(pattern, str) or pattern == "all-linear":
        return
    try:
        re.compile(pattern)
    except re.error as error:
        message = f"`{TARGETS}: {pattern}` is no regular expression: {error}"
        yield Problem(message, TARGETS, hint="write a list of names, or `all-linear`")
        return
    if re.fullmatch(r"[\w-]+", pattern):
        message = f"`{TARGETS}: {pattern}` is a regular expression that the whole name of a layer "
        message += "must match, and names have dots"
        meant = difflib.get_close_matches(pattern, ["all-linear"])
        hint = "did you mean" if meant else f"write a list: `[{pattern}]`, or"
        yield Problem(message, TARGETS, hint=f"{hint} `all-linear`" + "?" * len(meant))


def check_init_keeps_base(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Starting values that are taken from the base, where it is quantized, or for dora.

    What others load is the original base, quantized: not what is left of it, quantized. The
    difference is no adapter, so nothing that is exported could bring it back.
    """
    adapter = recipe.adapter
    if not isinstance(adapter, LoraOptions) or adapter.init not in ("pissa", "olora"):
        return
    hint = "use `init: default`"
    if recipe.quantization.kind != "none":
        message = f"`adapter.init: {adapter.init}` takes a part of the base away, and what is left "
        message += "quantizes to other weights than the base that an export is loaded on"
        yield Problem(message, "adapter.init", hint=f"{hint}, or `quantization: {{kind: none}}`")
    elif isinstance(adapter, DoraOptions):
        message = f"`adapter.init: {adapter.init}` does not work with `kind: dora`, whose export "
        message += "cannot hold what was taken from the base"
        yield Problem(message, "adapter.init", hint=f"{hint}, or `kind: lora`")


def check_targets_exist(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A name in ``target_modules`` that no linear layer of the model ends in."""
    card, adapter = card_of(recipe, base_dir), recipe.adapter
    if card is None or not isinstance(adapter, LoraOptions):
        return
    shapes = layer_linears(card)
    for name in () if isinstance(adapter.target_modules, str) else adapter.target_modules:
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
    check_target_pattern,
    check_targets_exist,
    check_init_keeps_base,
    check_new_layers_given,
    check_new_layers_divide,
)
NOTICES = (note_dora_cost,)
