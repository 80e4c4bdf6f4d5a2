"""Rows of numbers, one JSON line each, and the table of them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Values = dict[str, Any]
Built = TypeVar("Built")


class Rows:
    """Appends rows to a file that processes share.

    Args:
        path: of the file.
        part: that writes them.
    """

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self._part = part

    def write(self, name: str, values: Values) -> None:
        """Writes one row and prints it."""
        line = json.dumps({"part": self._part, "name": name, **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")  # one write: lines of processes do not mix
        print(line, flush=True)

    def attempt(self, name: str, function: Callable[..., Values], *args: Any, **given: Any) -> bool:
        """Writes what ``function`` returns, or why it did not; returns whether it did."""
        started = time.perf_counter()
        values = self._call(name, function, *args, **given)
        if values is None:
            return False
        self.write(name, values | {"all_s": round(time.perf_counter() - started, 1)})
        return True

    def build(self, name: str, function: Callable[..., Built], *args: Any, **given: Any) -> Any:
        """Returns what ``function`` does; None where it failed, which is written."""
        return self._call(name, function, *args, **given)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
        try:
            return function(*args, **given)
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0][:160]
            self.write(name, {"error": f"{type(error).__name__}: {first}"})
            return None


def read_rows(path: Path) -> list[Values]:
    """Returns all rows, in the order in which they were written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def print_table(rows: list[Values]) -> None:
    """Prints a line a row."""
    for row in rows:
        values = {key: value for key, value in row.items() if key not in ("part", "name")}
        text = "  ".join(f"{key}={_short(value)}" for key, value in values.items())
        print(f"{row['part']:<9} {row['name']:<40} {text}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
