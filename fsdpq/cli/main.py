"""The ``fsdpq`` command: one function a verb, data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

import fsdpq
from fsdpq.cli.importing import import_command
from fsdpq.cli.render import problem_fields, render_error, wants_color
from fsdpq.errors import ExitCode, FsdpqError, Problem, RecipeError, RunStoppedError, UsageError

Function = TypeVar("Function", bound=Callable[..., Any])

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_PATH = click.Path(path_type=Path)


def recipe_arguments(function: Function) -> Function:
    """Adds ``RECIPE [section.field=value ...]`` to a verb."""
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")(function)
    return click.argument("recipe", type=_PATH)(function)


@click.group(context_settings=_CONTEXT)
@click.version_option(fsdpq.__version__, prog_name="fsdpq", message="%(prog)s %(version)s")
def cli() -> None:
    """Finetune large language models on the GPUs you have.

    A recipe is one YAML file; `fsdpq train recipes/quickstart.yaml` runs one.
    """


@cli.command()
@recipe_arguments
@click.option(
    "--run-dir", type=_PATH, help="Where the run goes; default: a new directory in runs/."
)
def train(recipe: Path, overrides: tuple[str, ...], run_dir: Path | None) -> None:
    """Train RECIPE, one process per GPU, and export the adapter.

    The run directory is printed on stdout when the run is finished.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.train import train as run_training

    screen = open_screen(sys.stderr)
    files = run_training(recipe, overrides, run_dir=run_dir, screen=screen)
    screen.show_summary()
    click.echo(files.root)


@cli.command()
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON on stdout.")
def validate(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE and list every mistake in it."""
    from fsdpq.recipe.load import load_recipe

    try:
        load_recipe(recipe, overrides)
    except FsdpqError as error:
        if not as_json:
            raise
        click.echo(_as_json(error))
        sys.exit(error.exit_code)
    click.echo(_as_json(None) if as_json else f"{recipe}: no mistakes found")


@cli.command()
@recipe_arguments
def show(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Print RECIPE with overrides applied and every default spelled out."""
    from fsdpq.recipe.load import dump_recipe, load_recipe

    click.echo(dump_recipe(load_recipe(recipe, overrides).recipe), nl=False)


@cli.command()
@click.argument("section", required=False)
def kinds(section: str | None) -> None:
    """List what the sections of a recipe can hold."""
    from fsdpq.cli.kinds import render_overview, render_section

    for line in render_section(section) if section else render_overview():
        click.echo(line)


@cli.command()
@click.argument("run", type=_PATH)
@click.option("--prompt", required=True, help="The user's message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 takes the likeliest token each time.",
)  # fmt: skip
@click.option("--base", is_flag=True, help="Answer without the adapter.")
def generate(
    run: Path, *, prompt: str, max_new_tokens: int, temperature: float, base: bool
) -> None:
    """Print the answer of the finished run in the directory RUN."""
    from fsdpq.launch.generate import Question
    from fsdpq.launch.generate import generate as ask

    click.echo(ask(run, Question(prompt, max_new_tokens, temperature, base)))


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from fsdpq.recipe.root import recipe_schema_text

    click.echo(recipe_schema_text(), nl=False)


cli.add_command(import_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with an `ExitCode`.

    No input of the user ends in a traceback; a bug in fsdpq does, and says so.
    """
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except FsdpqError as error:
        _say(str(error) if isinstance(error, RunStoppedError) else render_error(error))
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        sys.exit(ExitCode.RECIPE)
    except click.ClickException as error:
        command = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fsdpq"
        )
        message = error.format_message().rstrip(".")
        _say(render_error(UsageError(message, hint=f"see `{command} --help`")))
        sys.exit(ExitCode.RECIPE)
    except (click.Abort, KeyboardInterrupt):
        _say("stopped")
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.RUN_FAILED)
    except Exception:
        _say(traceback.format_exc().rstrip())
        _say("this is a bug in fsdpq: please report it with the lines above")
        sys.exit(ExitCode.RUN_FAILED)


def _say(text: str) -> None:
    click.echo(text, err=True, color=wants_color(sys.stderr))


def _as_json(error: FsdpqError | None) -> str:
    problems: list[Problem] = []
    if isinstance(error, RecipeError):
        problems = error.problems
    elif error is not None:
        problems = [Problem(error.message, hint=error.hint)]
    fields = {"ok": error is None, "problems": [problem_fields(problem) for problem in problems]}
    return json.dumps(fields, indent=2)
