"""The changes of a recipe that trade speed, or something of the result, for memory.

One list a dimension, the mildest change first: what a dimension changes is changed once. They are
those of FSDP + QLoRA's first guide: checkpointing, sharding more, offload of the base, of the
activations, fewer rows at once; and, last, what trains another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fsdpq.plan.changes.settings import GLOBAL, Settings
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.quantization import BnbOptions

LENGTH_STEP = 128
"""Lengths that are suggested are multiples of this."""

MIN_LENGTH, MIN_RANK = 256, 4

OFFLOAD, TRAINED = "fsdp.offload", "fsdp.offload_trained"


@dataclass(frozen=True)
class Move:
    """One change.

    Attributes:
        settings: that belong together.
        cost: about the time a token as a multiple of before, where no time is known; from the log
            of measurements (docs/developing/log.md), for the order only.
        changes_result: another model comes out.
    """

    settings: Settings
    cost: float
    changes_result: bool = False


def list_moves(recipe: Recipe) -> list[list[Move]]:
    """Returns the moves from a resolved recipe, one list a dimension; some may not be allowed."""
    found = [
        list(moves)
        for moves in (
            _checkpointing(recipe),
            _sharding(recipe),
            _chunks(recipe),
            _activation_offload(recipe),
            _batch(recipe),
            _offload(recipe),
            _no_sync(recipe),
            _optimizer(recipe),
            _base(recipe),
            _rank(recipe),
            _length(recipe),
        )
    ]
    return [moves for moves in found if moves]


def batch_settings(recipe: Recipe, rows: int) -> Settings:
    """Returns what makes the micro-batch ``rows``, with as many rows a step as before.

    Where that is no whole number of micro-batches, with the next larger number.
    """
    training, work = recipe.training, workload_of(recipe)
    settings: list[tuple[str, int]] = [("training.micro_batch_size", rows)]
    if rows % training.layer_chunks:
        settings.append(("training.layer_chunks", math.gcd(rows, training.layer_chunks)))
    share = work.num_ranks * rows
    if work.global_rows % share:
        settings.append((GLOBAL, -(-work.global_rows // share) * share))
    return tuple(settings)


def _checkpointing(recipe: Recipe) -> Iterator[Move]:
    now = recipe.fsdp.activation_checkpointing
    key = "fsdp.activation_checkpointing"
    if now == "none":
        yield Move(((key, "selective"),), 1.17)
    if now != "full":
        yield Move(((key, "full"),), 1.33)


def _sharding(recipe: Recipe) -> Iterator[Move]:
    now, key = recipe.fsdp.strategy, "fsdp.strategy"
    if workload_of(recipe).num_ranks == 1:
        return
    if now == "ddp":
        yield Move(((key, "shard_grad_op"),), 1.02)
    if now == "hybrid_shard_grad_op":
        yield Move(((key, "hybrid_full_shard"),), 1.05)
    if now != "full_shard":
        whole = (("fsdp.shard_size", None),) if recipe.fsdp.shard_size is not None else ()
        yield Move(((key, "full_shard"), *whole), 1.08)


def _chunks(recipe: Recipe) -> Iterator[Move]:
    rows, now = recipe.training.micro_batch_size, recipe.training.layer_chunks
    for chunks in range(now + 1, rows + 1):
        if rows % chunks == 0:
            yield Move((("training.layer_chunks", chunks),), 1.03 + chunks / 100)


def _activation_offload(recipe: Recipe) -> Iterator[Move]:
    wanted = not recipe.fsdp.activation_offload
    yield Move((("fsdp.activation_offload", wanted),), 1.15 if wanted else 0.9)


def _batch(recipe: Recipe) -> Iterator[Move]:
    work = workload_of(recipe)
    own_rows = work.rows * work.micro_batches
    for rows in range(work.rows - 1, 0, -1):
        if own_rows % rows == 0:
            cost = 1 + 0.1 * math.log2(work.rows / rows)
            yield Move(batch_settings(recipe, rows), cost)


def _offload(recipe: Recipe) -> Iterator[Move]:
    fsdp = recipe.fsdp
    if fsdp.offload == "none":
        yield Move(((OFFLOAD, "cpu"), (TRAINED, False)), 1.5)
        yield Move(((OFFLOAD, "cpu"),), 1.6)
        yield Move(((OFFLOAD, "disk"), (TRAINED, False)), 3.0)
        yield Move(((OFFLOAD, "disk"),), 3.1)
        return
    if not fsdp.offload_trained:
        yield Move(((TRAINED, True),), 1.05)
    elif recipe.adapter.kind != "none":
        yield Move(((TRAINED, False),), 0.97)
    if fsdp.offload == "cpu":
        yield Move(((OFFLOAD, "disk"),), 2.0)
    else:
        yield Move(((OFFLOAD, "cpu"),), 0.5)
    yield Move(((OFFLOAD, "none"), (TRAINED, True)), 0.4)


def _no_sync(recipe: Recipe) -> Iterator[Move]:
    if recipe.fsdp.no_sync:
        yield Move((("fsdp.no_sync", False),), 1.05)


def _optimizer(recipe: Recipe) -> Iterator[Move]:
    if recipe.optimizer.kind == "adamw":
        yield Move((("optimizer.kind", "adamw_8bit"),), 1.01, changes_result=True)


def _base(recipe: Recipe) -> Iterator[Move]:
    base = recipe.quantization
    if isinstance(base, BnbOptions) and not base.double_quant:
        yield Move((("quantization.double_quant", True),), 1.02, changes_result=True)
    if base.kind == "none" and recipe.adapter.kind in ("lora", "dora"):
        yield Move((("quantization.kind", "bnb"),), 1.1, changes_result=True)
    if base.kind == "none" and recipe.adapter.kind == "none" and recipe.fsdp.precision == "auto":
        yield Move((("fsdp.precision", "bf16"),), 0.95, changes_result=True)


def _rank(recipe: Recipe) -> Iterator[Move]:
    adapter = recipe.adapter
    if not isinstance(adapter, LoraOptions):
        return
    rank = adapter.rank // 2
    while rank >= MIN_RANK:
        share = rank / adapter.rank
        alpha = adapter.alpha * (share**0.5 if adapter.use_rslora else share)
        settings = (("adapter.rank", rank), ("adapter.alpha", round(alpha, 4)))
        yield Move(settings, 0.99, changes_result=True)
        rank //= 2


def _length(recipe: Recipe) -> Iterator[Move]:
    for share in (0.75, 0.5, 0.375, 0.25, 0.125):
        length = int(recipe.data.seq_len * share) // LENGTH_STEP * LENGTH_STEP
        if MIN_LENGTH <= length < recipe.data.seq_len:
            yield Move((("data.seq_len", length),), 1.02, changes_result=True)
