"""States of 8-bit AdamW in a checkpoint: codes and scales as they are, for any number of ranks.

Means that were dequantized, saved and quantized again would not be the same: the least code of the
signed map is -0.993, so the scale of a block whose largest mean is negative shrinks. Hence codes
are kept, one byte a mean, and a scale for every 256 of them. A rank's blocks begin at its first
row; ranks that own other rows find other blocks. A new block inside an old one keeps codes and
scale; only one that reaches over the end of an old block is quantized again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq.dist import own_shard, placement, shard_range
from fsdpq.optimizer.adamw_8bit import BLOCK_SIZE, code_map, quantize_means
from fsdpq.protocols import Piece

SCALE = "absmax"


@dataclass
class _Loading:
    """What is read for one parameter: this rank's codes or means, and the scales of all ranks."""

    parameter: nn.Parameter
    num_shards: int
    numbers: dict[str, Any]
    pieces: dict[str, Piece] = field(default_factory=dict)


class SavedBlocks:
    """Maps the states of `fsdpq.optimizer.adamw_8bit.AdamW8bit` to pieces and back."""

    def __init__(self) -> None:
        self._loading: list[_Loading] = []

    def piece(self, parameter: nn.Parameter, key: str, value: Tensor) -> Piece:
        """Returns a state as this rank's part of a whole: rows, or scales of blocks."""
        shard = own_shard(parameter)
        if not key.startswith(SCALE):
            return Piece(value, tuple(parameter.shape), shard.start)
        place = placement(parameter)
        counts = block_counts(parameter, place.size)
        return Piece(value, (sum(counts),), sum(counts[: place.index]))

    def facts(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Returns how the rows were dealt, which says where blocks begin."""
        return {"num_shards": placement(parameter).size}

    def prepare(
        self, parameters: Mapping[str, nn.Parameter], facts: Mapping[str, Any]
    ) -> dict[str, Piece]:
        """Returns the pieces to load into, by ``name/key``."""
        self._loading = []
        found: dict[str, Piece] = {}
        for name, parameter in parameters.items():
            loading = _Loading(parameter, facts[name]["num_shards"], {})
            self._loading.append(loading)
            shard = own_shard(parameter)
            num_scales = sum(block_counts(parameter, loading.num_shards))
            for key, dtype in facts[name]["rows"].items():
                kind: torch.dtype = getattr(torch, dtype)
                if key.startswith(SCALE):
                    rows = torch.zeros(num_scales, dtype=kind, device=shard.rows.device)
                    loading.pieces[key] = Piece(rows, (num_scales,))
                else:
                    rows = torch.zeros_like(shard.rows, dtype=kind)
                    loading.pieces[key] = Piece(rows, tuple(parameter.shape), shard.start)
                found[f"{name}/{key}"] = loading.pieces[key]
        return found

    def finish(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Yields this rank's states; a rank without rows has none."""
        for loading in self._loading:
            rows = own_shard(loading.parameter).rows
            if rows.numel() == 0:
                yield loading.parameter, {}
                continue
            state: dict[str, Any] = {}
            for index in (1, 2):
                codes = loading.pieces[f"state{index}"].rows
                state[f"state{index}"] = codes
                if f"{SCALE}{index}" in loading.pieces:
                    scales = loading.pieces[f"{SCALE}{index}"].rows
                    state |= _deal_blocks(loading, codes, scales, index)
            yield loading.parameter, state
        self._loading = []


def block_counts(parameter: nn.Parameter, num_shards: int) -> list[int]:
    """Returns the blocks of each shard, where ``num_shards`` ranks share the rows."""
    width = parameter[0].numel() if parameter.ndim > 1 else 1
    ranges = (shard_range(parameter.shape[0], i, num_shards) for i in range(num_shards))
    return [-(-(stop - start) * width // BLOCK_SIZE) for start, stop in ranges]


def _deal_blocks(loading: _Loading, codes: Tensor, scales: Tensor, index: int) -> dict[str, Tensor]:
    """Returns codes and scales of this rank's blocks from those of the ranks that saved them."""
    old = _old_blocks(loading)
    size = codes.numel()
    num_blocks = -(-size // BLOCK_SIZE)
    padded = torch.nn.functional.pad(old, (0, num_blocks * BLOCK_SIZE - size), value=-1)
    blocks = padded.view(num_blocks, BLOCK_SIZE)
    first = blocks[:, :1]
    is_whole = ((blocks == first) | (blocks < 0)).all(dim=1)
    kept = scales[first.flatten()]
    if bool(is_whole.all()):
        return {f"{SCALE}{index}": kept}
    is_signed = index == 1
    means = code_map(codes.device, signed=is_signed)[codes.flatten().long()] * scales[old]
    again, new_scales = quantize_means(means, signed=is_signed)
    is_kept = is_whole.repeat_interleave(BLOCK_SIZE)[:size]
    new_codes = torch.where(is_kept, codes.flatten(), again.flatten()).view_as(codes)
    return {
        f"state{index}": new_codes,
        f"{SCALE}{index}": torch.where(is_whole, kept, new_scales),
    }


def _old_blocks(loading: _Loading) -> Tensor:
    """Returns, for every element of this rank's rows, its block among those of the saved scales."""
    parameter = loading.parameter
    shard = own_shard(parameter)
    width = parameter[0].numel() if parameter.ndim > 1 else 1
    counts = block_counts(parameter, loading.num_shards)
    parts: list[Tensor] = []
    before = 0
    for saver, count in enumerate(counts):
        start, stop = shard_range(parameter.shape[0], saver, loading.num_shards)
        low, high = max(start, shard.start), min(stop, shard.stop)
        if low < high:
            places = torch.arange((low - start) * width, (high - start) * width)
            parts.append(before + places // BLOCK_SIZE)
        before += count
    return torch.cat(parts).to(shard.rows.device)
