"""Lengths of rows in tokens: quantiles, a histogram, and what a limit would cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BINS = 20
LIMIT_STEP = 64
"""Suggested limits are multiples of it: kernels are fastest at such widths."""

KEPT_SHARE = 0.99
"""Share of the rows that a suggested limit leaves whole."""

Lengths = npt.NDArray[np.int32]


def describe_lengths(lengths: Lengths, seq_len: int) -> dict[str, Any]:
    """Returns quantiles, histogram and limits of ``lengths``, ``(rows,)``, as plain data."""
    if len(lengths) == 0:
        return {"rows": 0, "mean": 0.0, "quantiles": {}, "histogram": [], "limit": None}
    ordered = np.sort(lengths)
    quantiles = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    longer = len(ordered) - int(np.searchsorted(ordered, seq_len, side="right"))
    return {
        "rows": len(ordered),
        "mean": float(ordered.mean()),
        "quantiles": {name: quantile(ordered, share) for name, share in quantiles.items()},
        "histogram": histogram(ordered),
        "limit": {
            "seq_len": seq_len,
            "longer_rows": longer,
            "longer_share": longer / len(ordered),
            "tokens_beyond": int(np.maximum(ordered.astype(np.int64) - seq_len, 0).sum()),
            "kept_share": KEPT_SHARE,
            "keeps": suggested_limit(ordered),
        },
    }


def quantile(ordered: Lengths, share: float) -> int:
    """Returns the smallest length that ``share`` of the rows do not exceed (nearest rank)."""
    rank = max(1, math.ceil(round(share * len(ordered), 6)))
    return int(ordered[rank - 1])


def suggested_limit(ordered: Lengths) -> int:
    """Returns the smallest multiple of `LIMIT_STEP` that leaves `KEPT_SHARE` of the rows whole."""
    return math.ceil(quantile(ordered, KEPT_SHARE) / LIMIT_STEP) * LIMIT_STEP


def histogram(ordered: Lengths) -> list[dict[str, int | None]]:
    """Returns rows by length, ``low`` inclusive to ``high`` exclusive.

    A few very long rows share a last bin whose ``high`` is None, so that the others can be told
    apart.
    """
    most, longest = quantile(ordered, 0.995), int(ordered[-1])
    upper = longest if longest <= 2 * most else most
    width = _round_width((upper + 1) / MAX_BINS)
    edges = np.arange(0, upper + 1 + width, width)
    counts = np.diff(np.searchsorted(ordered, edges, side="left"))
    bins: list[dict[str, int | None]] = [
        {"low": int(low), "high": int(low) + width, "rows": int(count)}
        for low, count in zip(edges[:-1], counts, strict=True)
    ]
    beyond = len(ordered) - int(counts.sum())
    if beyond:
        bins.append({"low": int(edges[-1]), "high": None, "rows": beyond})
    while bins[0]["rows"] == 0:
        bins.pop(0)
    return bins


def _round_width(width: float) -> int:
    """Returns the next power of two: limits, which are multiples of them, fall between two bins."""
    return 1 << max(0, math.ceil(math.log2(width)))
