"""One rank's part of an optimizer step: rows as padded tensors, and where they carry loss.

Built with numpy, because a thread in the background builds it (`fsdpq.data.dealing.prefetch`):
torch's own threads would be started once more there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fsdpq.data.text.tokenize import Row

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

    def pin_memory(self) -> MicroBatch:
        """Returns the same batch in page-locked memory, from where a GPU copies it by itself."""
        return MicroBatch(
            self.input_ids.pin_memory(),
            self.loss_positions.pin_memory(),
            self.targets.pin_memory(),
            self.is_token.pin_memory(),
            self.num_tokens,
            None if self.position_ids is None else self.position_ids.pin_memory(),
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

    def pin_memory(self) -> Step:
        """Returns the same step in page-locked memory."""
        micro_batches = [micro_batch.pin_memory() for micro_batch in self.micro_batches]
        return Step(micro_batches, self.num_trained, self.num_tokens)


def build_step(batch: Sequence[Row], *, micro_batch_size: int, rank: int, world_size: int) -> Step:
    """Returns one rank's part of a global batch; see `share_rows`."""
    shares = share_rows(
        [len(row.input_ids) for row in batch],
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    return Step(
        [collate([batch[index] for index in share]) for share in shares],
        num_trained=sum(row.num_trained for row in batch),
        num_tokens=sum(len(row.input_ids) for row in batch),
    )


def share_rows(
    lengths: Sequence[int], *, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Returns which rows of a global batch a rank computes, a list for each of its micro-batches.

    All ranks have as many micro-batches; some may be empty. Rows of like length are computed at the
    same time on all ranks: little padding, and no rank waits for another's long rows. The loss does
    not depend on who computes what.

    Args:
        lengths: tokens of each row of the batch.
        micro_batch_size: rows that a rank computes at once.
        rank: whose rows.
        world_size: number of ranks.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    wave = micro_batch_size * world_size
    return [
        by_length[start : start + wave][rank::world_size]
        for start in range(0, len(by_length), wave)
    ]


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Pads rows to the longest of them; no rows give a batch of one token without loss."""
    lengths = np.array([len(row.input_ids) for row in rows] or [0], dtype=np.int64)
    width = max(1, int(lengths.max()))
    input_ids = np.full((len(lengths), width), PAD_ID, dtype=np.int64)
    has_loss = np.zeros((len(lengths), width), dtype=np.bool_)
    for index, row in enumerate(rows):
        input_ids[index, : lengths[index]] = row.input_ids
        has_loss[index, : lengths[index]] = row.loss_mask
    # A document's first token carries no loss, so no target crosses into the next document.
    has_loss[:, 0] = False
    target_places = np.flatnonzero(has_loss)
    is_packed = any(row.document_lengths for row in rows)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(target_places - 1),
        torch.from_numpy(input_ids.reshape(-1)[target_places]),
        torch.from_numpy(np.arange(width) < lengths[:, None]),
        int(lengths.sum()),
        torch.from_numpy(_position_ids(rows, width)) if is_packed else None,
    )


def _position_ids(rows: Sequence[Row], width: int) -> npt.NDArray[np.int64]:
    """Returns positions that restart at every document and at the padding, ``(rows, width)``."""
    places = np.arange(width, dtype=np.int64)
    positions = np.empty((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        padding = width - len(row.input_ids)
        lengths = np.array([*(row.document_lengths or (len(row.input_ids),)), padding])
        positions[index] = places - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return positions
