"""What packing makes of the rows, and what training computes for nothing without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fsdpq.data.pack import pack_lengths
from fsdpq.recipe.root import Recipe

DEFAULT_BATCH = 16
MAX_ROWS = 200_000
"""Rows whose padding is added up; of more rows it is that of so many drawn ones."""


def describe_packing(lengths: npt.NDArray[np.int64], recipe: Recipe) -> dict[str, Any]:
    """Returns the sequences that rows of ``lengths`` are packed into, and padding without packing.

    Args:
        lengths: tokens of every usable row, cut, ``(rows,)``.
        recipe: the recipe.
    """
    if len(lengths) == 0:
        return dict.fromkeys(("sequences", "fill", "rows_per_sequence", "padding_share")) | {
            "rows": 0
        }
    num_sequences = len(pack_lengths(lengths, recipe.data.seq_len))
    return {
        "rows": len(lengths),
        "sequences": num_sequences,
        "fill": float(lengths.sum() / (num_sequences * recipe.data.seq_len)),
        "rows_per_sequence": len(lengths) / num_sequences,
        "padding_share": padding_share(
            lengths,
            micro_batch_size=recipe.training.micro_batch_size,
            global_batch_size=recipe.training.global_batch_size or DEFAULT_BATCH,
            seed=recipe.training.seed,
        ),
    }


def padding_share(
    lengths: npt.NDArray[np.int64], *, micro_batch_size: int, global_batch_size: int, seed: int
) -> float:
    """Returns the share of padding in an epoch of rows that are not packed.

    As the loader does it: the rows of a step, which are drawn, are put together by length.
    """
    order = np.random.default_rng(seed).permutation(lengths)[:MAX_ROWS]
    computed = 0
    for start in range(0, len(order), global_batch_size):
        step = np.sort(order[start : start + global_batch_size])
        for first in range(0, len(step), micro_batch_size):
            batch = step[first : first + micro_batch_size]
            computed += len(batch) * int(batch[-1])
    return 1 - int(order.sum()) / computed
