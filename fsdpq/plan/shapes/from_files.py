"""The shape of a model from its config.json and what was seen of its weight files' headers.

The headers decide; the config says what tensors alone do not (heads, experts of a token). Where
headers were not seen, the config of a known family is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsdpq.cards.families import FAMILIES
from fsdpq.cards.find import card_of_config
from fsdpq.errors import CheckpointError
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.shapes.from_tensors import shape_from_tensors
from fsdpq.recipe.stored_quantization import UNQUANTIZED_HINT, is_bnb_4bit, method_of, stored_in

NEEDED_HINT = (
    "a plan needs the headers of safetensors files, or the config.json of one of these families: "
    + ", ".join(sorted(FAMILIES))
)


@dataclass(frozen=True)
class SeenFiles:
    """What was seen of the weight files of a model.

    Attributes:
        tensors: name -> shape; empty where no header was seen.
        num_bytes: of the files.
        lack: what is wrong with them, in words; empty where nothing is.
        is_base: they are a quantized base of this program.
        is_here: they lie on this machine.
    """

    tensors: Mapping[str, tuple[int, ...]]
    num_bytes: int | None = None
    lack: str = ""
    is_base: bool = False
    is_here: bool = False


def shape_from_files(name: str, config: Mapping[str, Any], files: SeenFiles) -> ModelShape:
    """Returns the shape of a model.

    Args:
        name: of its repository or directory.
        config: its ``config.json``; empty where there is none.
        files: its weights.

    Raises:
        CheckpointError: it cannot be told; says why.
    """
    card = card_of_config(name, config)
    known = None
    if card is not None:
        known = dataclasses.replace(shape_from_card(card), source="config", is_here=files.is_here)
    stored = stored_in(config)
    if stored is not None or files.is_base:
        return _quantized_shape(name, known, files, stored or {})
    if files.lack or not files.tensors:
        if known is not None:
            return known
        lack = files.lack or "it has no safetensors weights"
        raise CheckpointError(
            f"the shape of `{name}` cannot be told: {lack}, and its config.json says the model "
            f"type `{config.get('model_type', 'unknown')}`, of which there is no card",
            hint=NEEDED_HINT,
        )
    found = shape_from_tensors(name, config, files.tensors)
    return _with_files(_in_model_order(found, known), files)


def _with_files(shape: ModelShape, files: SeenFiles) -> ModelShape:
    return dataclasses.replace(
        shape, source="headers", checkpoint_bytes=files.num_bytes, is_here=files.is_here
    )


def _in_model_order(found: ModelShape, known: ModelShape | None) -> ModelShape:
    """Returns ``found``, its tensors in transformers' order where ``known`` has the same ones.

    Files sort tensors by name. A family that is known says more of itself than files do, too.
    """
    if known is None:
        return found
    if _contents(found) == _contents(known):
        return dataclasses.replace(known, name=found.name)
    facts = ("intermediate_size", "head_dim", "num_key_value_heads", "gated", "softcap")
    return dataclasses.replace(found, **{fact: getattr(known, fact) for fact in facts})


def _contents(shape: ModelShape) -> list[tuple[str, int, frozenset[tuple[str, tuple[int, ...]]]]]:
    return [
        (group.name, group.count, frozenset((t.name, t.shape) for t in group.tensors))
        for group in shape.groups
    ]


def _quantized_shape(
    name: str, known: ModelShape | None, files: SeenFiles, stored: Mapping[str, Any]
) -> ModelShape:
    """Returns the shape of a checkpoint whose matrices are quantized already.

    Raises:
        CheckpointError: no run could use it, or its family is none that is known by its config.
    """
    if not files.is_base and not is_bnb_4bit(stored):
        raise CheckpointError(
            f"the weights of `{name}` are quantized already, by {method_of(stored)}: only 4-bit "
            "weights of bitsandbytes can be read as they are",
            hint=UNQUANTIZED_HINT,
        )
    if known is None or not files.tensors:
        raise CheckpointError(
            f"`{name}` is quantized already, and the shape of its family cannot be told from "
            "packed weights",
            hint="plan for the model that it was made from",
        )
    found = _with_files(known, files)
    if files.is_base:
        return dataclasses.replace(found, stored_as="base")
    groups = tuple(_with_plain(found, group, files) for group in found.groups)
    return dataclasses.replace(found, groups=groups, stored_as="bnb")


def _with_plain(shape: ModelShape, group: GroupShape, files: SeenFiles) -> GroupShape:
    """Returns a group with those matrices marked that the files hold unquantized."""
    if group.name != "layer":
        return group
    first = f"{shape.layers_prefix}{shape.layer_indices(group)[0]}."

    def marked(tensor: TensorShape) -> TensorShape:
        is_matrix = tensor.kind in ("linear", "experts")
        packed = f"{first}{tensor.name}.absmax" in files.tensors
        return dataclasses.replace(tensor, stays_plain=is_matrix and not packed)

    return dataclasses.replace(group, tensors=tuple(marked(t) for t in group.tensors))
