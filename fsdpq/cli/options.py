"""Arguments that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from fsdpq.cli.render import render_warning, wants_color

Function = TypeVar("Function", bound=Callable[..., Any])


class RunPath(click.Path):
    """The directory of a run; the shell completes it to those in ``runs/`` and in sweeps."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Returns the runs that begin so; without any, any directory."""
        del ctx, param
        from fsdpq.launch.runs.listing import list_run_paths

        found = [str(path) for path in list_run_paths()]
        items = [CompletionItem(text) for text in found if text.startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="dir")]


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


def screen_options(function: Function) -> Function:
    """Adds ``--quiet`` and ``--json`` to a verb that runs something for long.

    The verb gets ``quiet`` and ``as_json``; `fsdpq.cli.screen.open_screen` takes the first.
    """
    function = click.option(
        "--json", "as_json", is_flag=True,
        help="Print one JSON document on stdout at the end, also where the run ends early.",
    )(function)  # fmt: skip
    return click.option(
        "--quiet", "-q", is_flag=True, help="Show nothing but errors, and the result on stdout."
    )(function)


def warn_of_code(trust_remote_code: bool) -> None:
    """Says on stderr what ``--trust-remote-code`` means, where it was given."""
    if trust_remote_code:
        say(render_warning("--trust-remote-code: Python code that came with the model will run"))
        say("with your rights, in every rank; use it only if you trust the model's authors")


def say(text: str) -> None:
    """Prints ``text`` on stderr."""
    click.echo(text, err=True, color=wants_color(sys.stderr))
