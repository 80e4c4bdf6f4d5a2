"""Rules about ``quantization``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, layer_linears, matches, model_directory
from fsdpq.recipe.describe import list_words
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.quantization import HqqOptions, NoQuantOptions
from fsdpq.recipe.stored_quantization import find_disagreements, read_stored_quantization

HEADS = ("lm_head", "embed_out")
"""What the output head is called."""


def check_base_can_be_trained(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A quantized base with ``adapter: none``: codes have no gradient."""
    if recipe.adapter.kind == "none" and recipe.quantization.kind != "none":
        message = "`adapter.kind: none` trains the base, and quantized weights cannot be trained"
        hint = "add `quantization: {kind: none}`, or use `adapter: {kind: lora}`"
        yield Problem(message, "adapter.kind", hint=hint)


def check_hqq_columns_have_groups(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``axis: 0`` without a group size: a group of a whole column cannot be cut over ranks."""
    options = recipe.quantization
    if isinstance(options, HqqOptions) and options.axis == 0 and options.group_size is None:
        message = "`quantization.axis: 0` needs a group size: a group of a whole column cannot be"
        message += " cut over ranks"
        hint = "use `group_size: 64`, or `axis: 1`, where null is one group a row"
        yield Problem(message, "quantization.axis", hint=hint)


def check_hqq_groups_fit(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Hqq groups that do not divide the side of a weight that they run along."""
    options, card = recipe.quantization, card_of(recipe, base_dir)
    if not isinstance(options, HqqOptions) or options.group_size is None or card is None:
        return
    size, kept = options.group_size, options.modules_to_not_convert
    shapes = [s for s in layer_linears(card) if not any(matches(s.name, name) for name in kept)]
    word = "inputs" if options.axis == 1 else "outputs"
    sides = {s.name: s.in_features if options.axis == 1 else s.out_features for s in shapes}
    crossed = {name: side for name, side in sides.items() if side % size}
    if crossed:
        names, first = list_words(crossed, "and"), next(iter(crossed.values()))
        message = f"`quantization.group_size: {size}` does not divide the {first} {word} of {names}"
        fitting = [n for n in (16, 32, 64, 128, 256) if not any(s % n for s in crossed.values())]
        other = "null" if options.axis == 1 else "axis: 1"
        hint = f"use {list_words([*map(str, fitting), other])}, or add them to"
        hint += " `modules_to_not_convert`"
        yield Problem(message, "quantization.group_size", hint=hint)


def check_unconverted_modules_exist(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A name in ``modules_to_not_convert`` that the model has no linear layer of."""
    card = card_of(recipe, base_dir)
    if card is None or isinstance(recipe.quantization, NoQuantOptions):
        return
    shapes = layer_linears(card)
    for name in recipe.quantization.modules_to_not_convert:
        if not any(matches(shape.name, name) for shape in shapes):
            key = "quantization.modules_to_not_convert"
            hint = f"its layers have {list_words((shape.name for shape in shapes), 'and')}"
            if name.rpartition(".")[2] in HEADS:
                hint = "delete it: the output head is never quantized"
            message = f"`{key}`: the model has no linear layer `{name}` to quantize"
            yield Problem(message, key, hint=hint)


def check_unconverted_modules_differ(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A name that ``modules_to_not_convert`` holds twice."""
    if not isinstance(recipe.quantization, NoQuantOptions):
        names, key = recipe.quantization.modules_to_not_convert, "modules_to_not_convert"
        yield from repeated(names, f"quantization.{key}")


def check_stored_quantization_agrees(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A model directory that is quantized already, in another way than the recipe says."""
    directory = model_directory(recipe, base_dir)
    stored = None if directory is None else read_stored_quantization(directory)
    if stored is None:
        return
    problems = list(find_disagreements(stored, recipe.quantization))
    yield from problems
    if not problems and recipe.adapter.kind == "llama_pro":
        message = "`adapter.kind: llama_pro` trains copies of layers, and the model's are quantized"
        hint = "name the unquantized repository, or use `adapter: {kind: lora}`"
        yield Problem(f"{message} already", "adapter.kind", hint=hint)


def repeated(names: tuple[str, ...], key: str) -> Iterator[Problem]:
    """Yields a Problem for every name that the list at ``key`` holds twice."""
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"`{key}` names `{name}` twice", key, hint="delete one of them")


CHECKS = (
    check_base_can_be_trained,
    check_hqq_columns_have_groups,
    check_hqq_groups_fit,
    check_unconverted_modules_exist,
    check_unconverted_modules_differ,
    check_stored_quantization_agrees,
)
