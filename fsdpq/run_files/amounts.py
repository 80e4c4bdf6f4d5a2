"""Amounts for people: bytes, counts, durations. Both halves print them alike."""

from __future__ import annotations


def format_bytes(num_bytes: float) -> str:
    """Returns memory or a file's size in binary units: ``1.25 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(number: float) -> str:
    """Returns a count with a decimal unit: ``134.5 M``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """Returns ``1 h 02 min``, ``2 min 05 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
