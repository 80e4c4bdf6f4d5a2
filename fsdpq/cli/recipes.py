"""``fsdpq recipes``: the shipped recipes, listed and copied."""

from __future__ import annotations

from pathlib import Path

import click

from fsdpq.cli.answers import echo_json, json_option


@click.group("recipes")
def recipes_group() -> None:
    """List the recipes that come with fsdpq, and copy one to start from."""


@recipes_group.command("ls")
@json_option
def recipes_ls(*, as_json: bool) -> None:
    """List the shipped recipes."""
    from dataclasses import asdict

    from fsdpq.cli.library import list_recipes, render_recipes

    entries = list_recipes()
    if as_json:
        echo_json([asdict(entry) for entry in entries])
        return
    for line in render_recipes(entries):
        click.echo(line)


@recipes_group.command("cp")
@click.argument("name")
@click.argument("destination", metavar="[DEST]", required=False, type=click.Path(path_type=Path))
def recipes_cp(name: str, destination: Path | None) -> None:
    """Copy the shipped recipe NAME to DEST, by default into this directory.

    The JSON Schema is written beside it, so that editors complete and check. The path of the copy
    is printed on stdout. Nothing is overwritten.
    """
    from fsdpq.cli.library import copy_recipe

    click.echo(copy_recipe(name, destination or Path()))
