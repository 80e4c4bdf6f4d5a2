"""Arguments that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fsdpq.cli.render import render_warning, wants_color

Function = TypeVar("Function", bound=Callable[..., Any])

trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that the model brings."
)
"""Adds ``--trust-remote-code`` to a verb."""

node_rank_option = click.option(
    "--node-rank", type=click.IntRange(min=0),
    help="Place of this machine among the recipe's launch.nnodes; default: any.",
)  # fmt: skip
"""Adds ``--node-rank`` to a verb."""


def recipe_arguments(function: Function) -> Function:
    """Adds ``RECIPE [section.field=value ...]`` to a verb."""
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")(function)
    return click.argument("recipe", type=click.Path(path_type=Path))(function)


def warn_of_code(trust_remote_code: bool) -> None:
    """Says on stderr what ``--trust-remote-code`` means, where it was given."""
    if trust_remote_code:
        say(render_warning("--trust-remote-code: Python code that came with the model will run"))
        say("with your rights, in every rank; use it only if you trust the model's authors")


def say(text: str) -> None:
    """Prints ``text`` on stderr."""
    click.echo(text, err=True, color=wants_color(sys.stderr))
