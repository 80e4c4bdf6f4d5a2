"""``fsdpq diff``: what differs between two recipes or runs."""

from __future__ import annotations

from pathlib import Path

import click

from fsdpq.cli.answers import json_option


@click.command("diff")
@click.argument("old", metavar="A", type=click.Path(path_type=Path))
@click.argument("new", metavar="B", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit with 1 where anything differs.")
@json_option
def diff_command(old: Path, new: Path, *, exit_code: bool, as_json: bool) -> None:
    """Compare the recipes or run directories A and B, defaults filled in.

    Prints the keys that differ, with both values and where each was written.
    """
    from fsdpq.cli.compare import print_diff

    print_diff(old, new, as_json=as_json, exit_code=exit_code)
