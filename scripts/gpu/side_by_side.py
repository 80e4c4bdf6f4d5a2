"""Plan, trace and measurement of the same runs beside each other, as a table for the docs.

``python -m scripts.gpu.side_by_side runs/proof/rows.jsonl [...]``: rows of several files, also of
several machines, are joined by their names. GiB are those that torch's allocator hands out at the
peak, then those that it reserves; the last column is what the first recipe reserved.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scripts.gpu.cases import CASES
from scripts.gpu.rows import read_rows

COLUMNS = (
    "plan", "trace", "measured", "measured / plan", "plan reserves", "reserved", "first recipe",
)  # fmt: skip


def joined(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Returns all values of all rows by the name of the row; later rows count."""
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        for row in read_rows(path):
            values = {key: value for key, value in row.items() if key not in ("part", "name")}
            found.setdefault(row["name"], {}).update(values)
    return found


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of all `CASES`, in Markdown."""
    yield "| " + " | ".join(("GiB", *COLUMNS)) + " |"
    yield "| --- " * (1 + len(COLUMNS)) + "|"
    for case in CASES:
        row = rows.get(case.name, {})
        plan, measured = row.get("plan_gib"), row.get("peak_gib")
        ratio = f"{measured / plan:.3f}" if plan and measured else ""
        cells = (_gib(plan), _gib(row.get("trace_gib")), _gib(measured), ratio,
                 _gib(row.get("plan_reserved_gib")), _gib(row.get("reserved_gib")),
                 _gib(case.theirs_gib))  # fmt: skip
        yield f"| {case.name} | " + " | ".join(cells) + " |"


ALONE_COLUMNS = (
    "plan, tokens/s",
    "tokens/s",
    "plan, host",
    "host",
    "anonymous",
    "pages of the file",
)
SPEEDS = ("plan_tokens_per_s", "tokens_per_s")


def alone_table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of the runs on one card: their speed, and GiB of the host."""
    yield "| GiB of the host | " + " | ".join(ALONE_COLUMNS) + " |"
    yield "| --- " * (1 + len(ALONE_COLUMNS)) + "|"
    for case in (case for case in CASES if case.ranks == 1):
        row = rows.get(case.name, {})
        speeds = [f"{row[k]:.0f}" if row.get(k) else "" for k in SPEEDS]
        keys = ("plan_host_gib", "host_gib", "anon_peak_gib", "file_pages_gib")
        yield f"| {case.name} | " + " | ".join([*speeds, *(_gib(row.get(k)) for k in keys)]) + " |"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="scripts.gpu.side_by_side", description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+")
    rows = joined(parser.parse_args().rows)
    print("\n".join([*table(rows), "", *alone_table(rows)]))


if __name__ == "__main__":
    main()
