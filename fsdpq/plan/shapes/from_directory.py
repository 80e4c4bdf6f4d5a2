"""The tensors of a model in a directory on this machine. Weights are not read, only headers.

The headers decide; ``config.json`` says what tensors alone do not (heads, experts of a token).
Where there are no weights yet, the ``config.json`` of a known family is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdpq.cards.find import card_from_config
from fsdpq.errors import CheckpointError
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.plan.shapes.config_facts import read_config
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.shapes.from_tensors import shape_from_tensors
from fsdpq.recipe.stored_quantization import (
    UNQUANTIZED_HINT,
    is_bnb_4bit,
    method_of,
    read_stored_quantization,
)
from fsdpq.tensor_files.base_manifest import is_base
from fsdpq.tensor_files.directory import TensorDirectory, check_directory

NEEDED_HINT = (
    "a plan needs the headers of safetensors files, or the config.json of a family that "
    "`fsdpq kinds family` lists"
)


def shape_from_directory(directory: Path) -> ModelShape:
    """Returns the shape of the checkpoint in ``directory``; also of one that is not whole.

    Raises:
        CheckpointError: it cannot be told; says why.
    """
    config = read_config(directory)
    card = card_from_config(directory)
    from_card = shape_from_card(card) if card else None
    stored = read_stored_quantization(directory)
    files = _read_files(directory)
    if stored is not None or is_base(directory):
        return _quantized_shape(directory, from_card, files, stored or {})
    if files is None or files.lost:
        if from_card is None:
            raise CheckpointError(
                f"the shape of `{directory}` cannot be told: "
                + ("its weights are not whole" if files else "it has no safetensors weights")
                + f", and its model type is `{config.get('model_type', 'unknown')}`",
                hint=NEEDED_HINT,
            )
        return dataclasses.replace(from_card, source="config", is_here=True)
    tensors = {name: entry.shape for name, entry in files.entries.items()}
    found = shape_from_tensors(str(directory), config, tensors)
    return dataclasses.replace(
        in_model_order(found, from_card), checkpoint_bytes=_file_bytes(files), is_here=True
    )


def in_model_order(found: ModelShape, known: ModelShape | None) -> ModelShape:
    """Returns ``found``, its tensors in transformers' order where ``known`` has the same ones.

    Files sort tensors by name. A family that is known says more of itself than files do, too.
    """
    if known is None:
        return found
    if _contents(found) != _contents(known):
        facts = {"intermediate_size", "head_dim", "num_key_value_heads", "gated", "softcap"}
        return dataclasses.replace(found, **{fact: getattr(known, fact) for fact in facts})
    return dataclasses.replace(
        known, name=found.name, source="headers", checkpoint_bytes=found.checkpoint_bytes
    )


def _contents(shape: ModelShape) -> list[tuple[str, int, frozenset[tuple[str, tuple[int, ...]]]]]:
    return [
        (group.name, group.count, frozenset((t.name, t.shape) for t in group.tensors))
        for group in shape.groups
    ]


def _read_files(directory: Path) -> TensorDirectory | None:
    """Returns the headers of all weight files, None where there are none to read."""
    files, _ = check_directory(directory)
    return files if files.headers else None


def _file_bytes(files: TensorDirectory) -> int:
    return sum(header.path.stat().st_size for header in files.headers)


def _quantized_shape(
    directory: Path,
    known: ModelShape | None,
    files: TensorDirectory | None,
    stored: Mapping[str, Any],
) -> ModelShape:
    """Returns the shape of a checkpoint whose matrices are quantized already.

    Raises:
        CheckpointError: no run could use it, or its family is none that is known by its config.
    """
    base = is_base(directory)
    if not base and not is_bnb_4bit(stored):
        raise CheckpointError(
            f"the weights of `{directory}` are quantized already, by {method_of(stored)}: only "
            "4-bit weights of bitsandbytes can be read as they are",
            hint=UNQUANTIZED_HINT,
        )
    if known is None or files is None:
        raise CheckpointError(
            f"`{directory}` is quantized already, and the shape of its family cannot be told from "
            "packed weights",
            hint="plan for the model that it was made from",
        )
    found = dataclasses.replace(
        known, source="headers", checkpoint_bytes=_file_bytes(files), is_here=True
    )
    if base:
        return dataclasses.replace(found, stored_as="base")
    groups = tuple(_with_plain(found, group, files) for group in found.groups)
    return dataclasses.replace(found, groups=groups, stored_as="bnb")


def _with_plain(shape: ModelShape, group: GroupShape, files: TensorDirectory) -> GroupShape:
    """Returns a group with those linear layers marked that the files hold unquantized."""
    if group.name != "layer":
        return group
    first = f"{shape.layers_prefix}{(group.indices or (0,))[0]}."

    def marked(tensor: TensorShape) -> TensorShape:
        is_matrix = tensor.kind in ("linear", "experts")
        packed = f"{first}{tensor.name}.absmax" in files.entries
        return dataclasses.replace(tensor, stays_plain=is_matrix and not packed)

    return dataclasses.replace(group, tensors=tuple(marked(t) for t in group.tensors))
