"""Asking ``nvidia-smi``: its one door, and the one parser of its tables.

https://docs.nvidia.com/deploy/nvidia-smi/
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence

TIMEOUT_S = 30.0
NOT_KNOWN = ("", "N/A", "Not Supported", "Unknown Error", "Insufficient Permissions", "Not Found")
"""What stands in a table for what the driver cannot say, without its brackets."""


def ask_nvidia_smi(*arguments: str) -> str | None:
    """Returns what ``nvidia-smi`` prints; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],  # noqa: S607  found on PATH, as users install it
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S,
            check=False, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def query_table(fields: Sequence[str], *, of: str = "gpu") -> list[dict[str, str]] | None:
    """Returns the rows of ``nvidia-smi --query-<of>``; None where it does not answer.

    Args:
        fields: names of columns; a driver that does not know one of them answers nothing.
        of: what the rows are: ``gpu``, ``compute-apps``.

    Returns:
        For each row a dictionary of those fields of which the driver says something; numbers
        without units, memory in MiB.
    """
    text = ask_nvidia_smi(f"--query-{of}={','.join(fields)}", "--format=csv,noheader,nounits")
    if text is None:
        return None
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    return [
        {field: cell for field, cell in zip(fields, row, strict=True) if _says_something(cell)}
        for row in rows
        if len(row) == len(fields)
    ]


def _says_something(cell: str) -> bool:
    return cell.strip("[]") not in NOT_KNOWN
