"""Deals rows to optimizer steps, ranks and micro-batches.

A row is one document, or one sequence of packed documents. The order of rows depends on seed and
epoch only. Every step takes the next ``global_batch_size``
rows and deals them to the ranks in micro-batches. All ranks run the same number of micro-batches: a
rank without rows left gets an empty one, so any number of ranks trains on the same rows and nobody
waits for a collective that never comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdpq.data.tokenize import Row

PAD_ID = 0
"""Fills rows at the right. Causal attention never looks there, and no loss is computed there, so
any id of the vocabulary will do."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank computes at once.

    Attributes:
        input_ids: ``(rows, tokens)``, int64, padded at the right.
        loss_positions: indices into ``rows * tokens`` whose next token carries loss, int64.
        targets: those next tokens, int64; as many as ``loss_positions``, maybe none.
        is_token: False at padding, of the shape of ``input_ids``, bool.
        num_tokens: how often it is True.
        position_ids: of the same shape where rows are packed: they restart at every document, and
            once more at the padding. None where every row is one document.
    """

    input_ids: Tensor
    loss_positions: Tensor
    targets: Tensor
    is_token: Tensor
    num_tokens: int
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Returns the same batch on ``device``."""
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.loss_positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.is_token.to(device, non_blocking=True),
            self.num_tokens,
            None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Step:
    """One rank's part of one optimizer step.

    Attributes:
        micro_batches: as many as on every other rank.
        num_trained: tokens of all ranks that carry loss; the loss is divided by it.
        num_tokens: tokens of all ranks, padding left out.
    """

    micro_batches: list[MicroBatch]
    num_trained: int
    num_tokens: int


def split_rows(num_rows: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns row indices for training and for evaluation.

    The held-out rows depend on the seed only. At least one row is held out when a fraction is
    asked for and there are two rows or more.
    """
    order = _shuffled(num_rows, seed)
    num_eval = min(num_rows - 1, max(1, round(num_rows * eval_fraction))) if eval_fraction else 0
    return sorted(order[num_eval:]), sorted(order[:num_eval])


def iterate_steps(
    rows: Sequence[Row],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
) -> Iterator[Step]:
    """Yields steps without end; a batch that reaches the end of an epoch goes on in the next."""
    order = _endless_order(len(rows), seed)
    while True:
        batch = [rows[next(order)] for _ in range(global_batch_size)]
        yield build_step(batch, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)


def build_step(batch: Sequence[Row], *, micro_batch_size: int, rank: int, world_size: int) -> Step:
    """Returns one rank's part of a global batch.

    Rows of like length are computed at the same time on all ranks: little padding, and no rank
    waits for another's long rows. The loss does not depend on who computes what.
    """
    by_length = sorted(batch, key=lambda row: len(row.input_ids))
    wave = micro_batch_size * world_size
    micro_batches = [
        collate(by_length[start : start + wave][rank::world_size])
        for start in range(0, len(by_length), wave)
    ]
    return Step(
        micro_batches,
        num_trained=sum(row.num_trained for row in batch),
        num_tokens=sum(len(row.input_ids) for row in batch),
    )


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Pads rows to the longest of them; no rows give a batch of one token without loss."""
    width = max((len(row.input_ids) for row in rows), default=1)
    lengths = torch.tensor([[len(row.input_ids)] for row in rows] or [[0]])
    is_token = torch.arange(width) < lengths
    input_ids = torch.full_like(is_token, PAD_ID, dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        # A document's first token carries no loss, so no target crosses into the next document.
        for place in range(1, len(row.input_ids)):
            if row.loss_mask[place]:
                positions.append(index * width + place - 1)
                targets.append(row.input_ids[place])
    return MicroBatch(
        input_ids,
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        is_token,
        int(lengths.sum()),
        _position_ids(rows, width) if any(row.document_lengths for row in rows) else None,
    )


def _position_ids(rows: Sequence[Row], width: int) -> Tensor:
    """Returns positions that restart at every document and at the padding, ``(rows, width)``."""
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        padding = width - len(row.input_ids)
        lengths = (*(row.document_lengths or (len(row.input_ids),)), padding)
        positions[index] = torch.cat([torch.arange(length) for length in lengths])
    return positions


def _endless_order(num_rows: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        epoch += 1
        yield from _shuffled(num_rows, seed + epoch)


def _shuffled(num_rows: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator).tolist()
