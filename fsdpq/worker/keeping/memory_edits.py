"""Which changes of a recipe make a run that ran out of device memory smallest, by arithmetic.

The formulas are those of docs/concepts/memory.md, over the numbers of this run; they are for
choosing, not for promising. A change is listed where it changes something in this recipe and frees
what the phase holds that ran out, and where the recipe stays valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fsdpq.recipe.checks import CHECKS
from fsdpq.recipe.root import Recipe

Phase = Literal["load", "forward", "backward", "optimizer", "evaluation"]

LAYER_ELEMENTS = 28.5
"""Elements a token and hidden unit that the backward pass of a decoder layer keeps: measured, see
docs/concepts/memory.md ("57 n h" bytes in bf16)."""

STATES_8BIT = 0.26
"""Bytes of 8-bit running means and their scales over those in fp32."""


@dataclass(frozen=True)
class Sizes:
    """What the arithmetic needs to know of a run.

    Attributes:
        num_layers: decoder layers.
        hidden_size: elements of a token between layers.
        element_bytes: of the compute dtype.
        num_ranks: of the run.
        frozen_bytes: this rank's shards of frozen weights on the device.
        frozen_whole_bytes: the frozen weights of all ranks, one copy.
        trained_bytes: this rank's trained weights on the device.
        gradient_bytes: of them, on the device, once they exist.
        state_bytes: of the optimizer on the device, once they exist.
    """

    num_layers: int
    hidden_size: int
    element_bytes: int
    num_ranks: int
    frozen_bytes: int
    frozen_whole_bytes: int
    trained_bytes: int
    gradient_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Edit:
    """A change of the recipe.

    Attributes:
        overrides: ``section.field=value``, to be added to the command line together.
        saved_bytes: about how much less a rank holds.
        note: what else it changes, may be empty.
    """

    overrides: tuple[str, ...]
    saved_bytes: float
    note: str = ""


def list_edits(recipe: Recipe, sizes: Sizes, phase: Phase, *, base_dir: Path) -> list[Edit]:
    """Returns the changes that help, most helpful first; those that change results come last.

    Args:
        recipe: resolved.
        sizes: of the run.
        phase: in which memory ran out.
        base_dir: directory that the recipe's relative paths start from.
    """
    found = [*_of_base(recipe, sizes), *_of_trained(recipe, sizes, phase)]
    if phase in ("forward", "backward", "evaluation"):
        found += _of_activations(recipe, sizes, phase)
    helpful = [edit for edit in found if edit.saved_bytes > 0 and _fits(recipe, edit, base_dir)]
    return sorted(helpful, key=lambda edit: (bool(edit.note), -edit.saved_bytes))


def activation_bytes(recipe: Recipe, sizes: Sizes) -> float:
    """Returns what the activations of a micro-batch take on the device at most, logits aside."""
    training, fsdp = recipe.training, recipe.fsdp
    tokens = training.micro_batch_size * recipe.data.seq_len
    unit = tokens * sizes.hidden_size * sizes.element_bytes
    layer = LAYER_ELEMENTS * unit
    kept = {"full": 0, "selective": sizes.num_layers // 2, "none": sizes.num_layers}
    num_kept = kept[fsdp.activation_checkpointing]
    inputs = 0 if fsdp.activation_offload else unit * (sizes.num_layers - num_kept)
    return inputs + layer * num_kept + layer / training.layer_chunks


def _of_activations(recipe: Recipe, sizes: Sizes, phase: Phase) -> Iterator[Edit]:
    now = activation_bytes(recipe, sizes)
    unit = recipe.training.micro_batch_size * recipe.data.seq_len
    if phase == "evaluation":  # keeps nothing for a backward pass: about one layer's products
        now = LAYER_ELEMENTS * unit * sizes.hidden_size * sizes.element_bytes
    training = recipe.training
    if (micro := _smaller_micro_batch(recipe)) is not None:
        overrides = [f"training.micro_batch_size={micro}"]
        if micro % training.layer_chunks:
            overrides.append(f"training.layer_chunks={micro}")
        yield Edit(tuple(overrides), now * (1 - micro / training.micro_batch_size))
    if recipe.data.seq_len >= 256:
        shorter = recipe.data.seq_len // 2
        note = "rows are cut or packed differently: another run"
        yield Edit((f"data.seq_len={shorter}",), now / 2, note)
    if phase == "evaluation":
        return
    for override, changed in (
        ("fsdp.activation_checkpointing=full", {"activation_checkpointing": "full"}),
        ("fsdp.activation_offload=true", {"activation_offload": True}),
    ):
        smaller = recipe.model_copy(update={"fsdp": recipe.fsdp.model_copy(update=changed)})
        yield Edit((override,), now - activation_bytes(smaller, sizes))
    chunks = training.micro_batch_size
    chunked = training.model_copy(update={"layer_chunks": chunks})
    smaller = recipe.model_copy(update={"training": chunked})
    yield Edit((f"training.layer_chunks={chunks}",), now - activation_bytes(smaller, sizes))


def _smaller_micro_batch(recipe: Recipe) -> int | None:
    """Returns the largest size up to a half that divides a rank's rows, None below one row."""
    training = recipe.training
    ranks = int(recipe.launch.nproc_per_node) * recipe.launch.nnodes
    rows = (training.global_batch_size or training.micro_batch_size * ranks) // ranks
    for size in range(training.micro_batch_size // 2, 0, -1):
        if rows % size == 0 and (size % training.layer_chunks == 0 or rows % size == 0):
            return size
    return None


def _of_base(recipe: Recipe, sizes: Sizes) -> Iterator[Edit]:
    fsdp, whole, ranks = recipe.fsdp, sizes.frozen_whole_bytes, sizes.num_ranks
    if ranks > 1 and fsdp.strategy != "full_shard":
        share = whole / ranks
        gathered = 0.0 if fsdp.strategy.endswith("full_shard") else whole
        held = sizes.frozen_bytes if fsdp.strategy == "ddp" else sizes.frozen_bytes + gathered
        two_layers = 2 * whole / max(1, sizes.num_layers)
        overrides = ["fsdp.strategy=full_shard"]
        overrides += [] if fsdp.shard_size is None else ["fsdp.shard_size=null"]
        yield Edit(tuple(overrides), held - share - two_layers)
    if fsdp.offload == "none":
        moved = sizes.frozen_bytes + _bytes_of_training(sizes, with_states=True)
        yield Edit(("fsdp.offload=cpu",), moved)
    elif not fsdp.offload_trained:
        moved = _bytes_of_training(sizes, with_states=True)
        yield Edit(("fsdp.offload_trained=true",), moved)


def _of_trained(recipe: Recipe, sizes: Sizes, phase: Phase) -> Iterator[Edit]:
    if recipe.optimizer.kind == "adamw" and phase != "load":
        states = sizes.state_bytes or 2 * sizes.trained_bytes
        note = "running means are rounded to 8 bits"
        yield Edit(("optimizer.kind=adamw_8bit",), states * (1 - STATES_8BIT), note)


def _bytes_of_training(sizes: Sizes, *, with_states: bool) -> int:
    """Trained weights, their gradients and states; those that do not exist yet are as AdamW's."""
    gradients = sizes.gradient_bytes or sizes.trained_bytes
    states = sizes.state_bytes or 2 * sizes.trained_bytes
    return sizes.trained_bytes + gradients + (states if with_states else 0)


def _fits(recipe: Recipe, edit: Edit, base_dir: Path) -> bool:
    """Whether the recipe with the change is another one, and has no problem that it had not."""
    changed = apply_overrides(recipe, edit.overrides)
    if changed is None or changed == recipe:
        return False
    return not (_problems(changed, base_dir) - _problems(recipe, base_dir))


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe | None:
    """Returns the recipe with simple overrides, None where a value is not allowed."""
    data: dict[str, Any] = recipe.model_dump(mode="json")
    for override in overrides:
        key, _, text = override.partition("=")
        section, field = key.split(".")
        words: dict[str, Any] = {"true": True, "null": None}
        data[section][field] = int(text) if text.isdigit() else words.get(text, text)
    try:
        return Recipe.model_validate(data)
    except ValidationError:
        return None


def _problems(recipe: Recipe, base_dir: Path) -> set[tuple[str, str]]:
    return {(p.key, p.message) for check in CHECKS for p in check(recipe, base_dir)}
