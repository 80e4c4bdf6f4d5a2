"""How many rows of each part a mixture takes, and which.

With weights an epoch takes of every part a number of rows in proportion to its weight, within one
row: the products are exact fractions, rounded once. Which rows depends on the seed only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Int64 = npt.NDArray[np.int64]


def count_rows(
    num_rows: Sequence[int],
    weights: Sequence[float],
    stopping: Literal["first_exhausted", "all_exhausted"],
) -> list[int]:
    """Returns how many rows of each part an epoch has.

    ``first_exhausted``: the most for which no part gives more rows than it has; the part that ends
    the epoch gives all of its rows. ``all_exhausted``: the fewest for which every part gives all
    of its rows.

    Args:
        num_rows: rows of each part, 1 or more.
        weights: greater than 0; taken as they are written, 0.1 is a tenth.
        stopping: ``data.mixture_stopping``.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scales = [count / weight for count, weight in zip(num_rows, exact, strict=True)]
    if stopping == "first_exhausted":
        scale = min(scales)
        return [math.floor(scale * weight) for weight in exact]
    scale = max(scales)
    return [math.ceil(scale * weight) for weight in exact]


def choose_rows(rows: Int64, count: int, *, seed: int, part: int) -> Int64:
    """Returns ``count`` of ``rows``: each as often as any other, within one.

    Rows stand in their own order, once through for every time that all of them are taken.

    Args:
        rows: numbers of documents of one part.
        count: any number.
        seed: of the recipe.
        part: number of the part; others of the same size choose other rows.
    """
    times, extra = divmod(count, len(rows))
    text = f"mixture {seed} {part}".encode()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(text).hexdigest()[:15], 16))
    drawn = torch.randperm(len(rows), generator=generator)[:extra].numpy()
    return np.concatenate([*[rows] * times, rows[np.sort(drawn)]])
