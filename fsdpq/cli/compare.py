"""The text and the JSON of ``fsdpq diff``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from fsdpq.cli.answers import echo_json
from fsdpq.cli.render import clean
from fsdpq.errors import ExitCode
from fsdpq.recipe.difference import Difference, compare, diff_lines
from fsdpq.recipe.view import open_view


def print_diff(old: Path, new: Path, *, as_json: bool, exit_code: bool) -> None:
    """Prints the keys that differ; exits 1 where there are any and ``exit_code`` is set."""
    views = open_view(old), open_view(new)
    found = list(compare(*views))
    if as_json:
        echo_json({"old": str(old), "new": str(new), "keys": [asdict(entry) for entry in found]})
    else:
        for line in _render(found, old, new):
            click.echo(line)
    if found and exit_code:
        sys.exit(ExitCode.RUN_FAILED)


def _render(found: list[Difference], old: Path, new: Path) -> Iterator[str]:
    if not found:
        yield f"{old} and {new} mean the same"
        return
    yield from (f"--- {clean(str(old))}", f"+++ {clean(str(new))}")
    yield from map(clean, diff_lines(found))
