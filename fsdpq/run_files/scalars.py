"""The numbers of rows of ``metrics.jsonl``, by the names that they have in other tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by the name they have in other tools (``train/loss``)."""
    group = {"step": "train", "eval": "eval", "memory": "memory"}.get(row["event"])
    if group is None:
        return {}
    prefix = f"{group}/{row['phase']}" if group == "memory" else group
    return {
        f"{prefix}/{key}": float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "total_steps", "time")
    }
