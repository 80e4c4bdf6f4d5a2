"""``fsdpq prepare``: the data of a recipe, tokenized and packed ahead."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.answers import echo_json, json_option
from fsdpq.cli.options import recipe_arguments, trust_option, warn_of_code


@click.command("prepare")
@recipe_arguments
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N",
    help="Processes that tokenize; default: one a core. Fewer need less memory.",
)  # fmt: skip
@json_option
@trust_option
def prepare_command(
    recipe: Path,
    *,
    overrides: tuple[str, ...],
    processes: int | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Tokenize and pack the data of RECIPE into the cache.

    `fsdpq train` does the same before it starts, and starts at once where the data is there. The
    model's weights are not needed. The directory is printed on stdout.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.inputs.prepare import prepare

    warn_of_code(trust_remote_code)
    found = prepare(
        recipe,
        overrides,
        screen=open_screen(sys.stderr),
        num_processes=processes,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        echo_json(found.as_json())
    else:
        click.echo(found.directory)
