"""The ``fsdpq`` command: one function a verb, data on stdout, everything else on stderr."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

import fsdpq
from fsdpq.cli.answering.chat import chat_command
from fsdpq.cli.answering.generate import generate_command
from fsdpq.cli.answers import echo_json, error_fields, json_option
from fsdpq.cli.bench import bench_command
from fsdpq.cli.cache import cache_group
from fsdpq.cli.data import data_group
from fsdpq.cli.diff import diff_command
from fsdpq.cli.doctor import doctor_command
from fsdpq.cli.evaluate import eval_command
from fsdpq.cli.importing import import_command
from fsdpq.cli.merge import merge_command
from fsdpq.cli.migrate import migrate_command
from fsdpq.cli.options import recipe_arguments, say
from fsdpq.cli.plan import plan_command
from fsdpq.cli.prepare import prepare_command
from fsdpq.cli.push import push_command
from fsdpq.cli.quantize import quantize_command
from fsdpq.cli.recipes import recipes_group
from fsdpq.cli.render import render_error, render_notice
from fsdpq.cli.reproduce import reproduce_command
from fsdpq.cli.resume import resume_command
from fsdpq.cli.runs.jobs import cancel_command, logs_command, status_command
from fsdpq.cli.runs.listing import runs_group
from fsdpq.cli.runs.report import report_command
from fsdpq.cli.runs.tail import tail_command
from fsdpq.cli.sweeps.sweep import sweep_command
from fsdpq.cli.train import train_command
from fsdpq.errors import ExitCode, FsdpqError, RunStoppedError, UsageError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_PATH = click.Path(path_type=Path)


@click.group(context_settings=_CONTEXT)
@click.version_option(fsdpq.__version__, prog_name="fsdpq", message="%(prog)s %(version)s")
def cli() -> None:
    """Finetune large language models on the GPUs you have.

    A recipe is one YAML file; `fsdpq train recipes/quickstart.yaml` runs one.
    """


@cli.command()
@recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON on stdout.")
def validate(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE and list every mistake in it."""
    from fsdpq.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    if as_json:
        echo_json(error_fields(None) | {"notices": list(loaded.notices)})
    else:
        _say_notices(loaded.notices)
        click.echo(f"{recipe}: no mistakes found")


@cli.command()
@recipe_arguments
@click.option(
    "--explain", "key", metavar="KEY",
    help="Explain one key, or every key of a section: value, source, type, default, meaning.",
)  # fmt: skip
@json_option
def show(recipe: Path, overrides: tuple[str, ...], *, key: str | None, as_json: bool) -> None:
    """Print RECIPE with overrides applied and every default spelled out.

    RECIPE may also be a run directory.
    """
    from fsdpq.cli.explain import explanation_fields, render_explanations
    from fsdpq.recipe.explain import explain
    from fsdpq.recipe.load import dump_recipe
    from fsdpq.recipe.view import open_view

    view = open_view(recipe, overrides)
    _say_notices(view.notices)
    found = explain(view, key) if key is not None else []
    if as_json:
        plain = view.recipe.model_dump(mode="json")
        echo_json([explanation_fields(entry) for entry in found] if key is not None else plain)
    elif key is not None:
        for line in render_explanations(found, key):
            click.echo(line)
    else:
        click.echo(dump_recipe(view.recipe), nl=False)


@cli.command()
@click.argument("section", required=False)
@json_option
def kinds(section: str | None, *, as_json: bool) -> None:
    """List what the sections of a recipe can hold."""
    from fsdpq.cli.kinds import kinds_fields, render_overview, render_section

    if as_json:
        echo_json(kinds_fields(section))
        return
    for line in render_section(section) if section else render_overview():
        click.echo(line)


@cli.command()
@click.option("--sweep", "of_sweep", is_flag=True, help="Of a sweep.yaml instead.")
def schema(*, of_sweep: bool) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from fsdpq.recipe.root import recipe_schema_text

    if of_sweep:
        from fsdpq.sweep.choosing.document import sweep_schema_text

        click.echo(sweep_schema_text(), nl=False)
    else:
        click.echo(recipe_schema_text(), nl=False)


cli.add_command(bench_command)
cli.add_command(cache_group)
cli.add_command(cancel_command)
cli.add_command(chat_command)
cli.add_command(data_group)
cli.add_command(diff_command)
cli.add_command(doctor_command)
cli.add_command(eval_command)
cli.add_command(generate_command)
cli.add_command(import_command)
cli.add_command(logs_command)
cli.add_command(merge_command)
cli.add_command(migrate_command)
cli.add_command(plan_command)
cli.add_command(prepare_command)
cli.add_command(push_command)
cli.add_command(quantize_command)
cli.add_command(recipes_group)
cli.add_command(report_command)
cli.add_command(reproduce_command)
cli.add_command(resume_command)
cli.add_command(status_command)
cli.add_command(sweep_command)
cli.add_command(runs_group)
cli.add_command(tail_command)
cli.add_command(train_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with an `ExitCode`.

    No input of the user ends in a traceback; a bug in fsdpq does, and says so.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(
        50_000
    )  # a twentieth of the start-up was a search for garbage that is not there
    # Third-party plugins would be searched in every installed package, and could run code.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        cli.main(args=given, prog_name="fsdpq", standalone_mode=False)
    except FsdpqError as error:
        _report(error, as_json="--json" in given)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        sys.exit(ExitCode.RECIPE)
    except click.ClickException as error:
        command = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fsdpq"
        )
        message = error.format_message().rstrip(".")
        usage = UsageError(message, hint=f"see `{command} --help`")
        _report(usage, as_json="--json" in given)
        sys.exit(ExitCode.RECIPE)
    except (click.Abort, KeyboardInterrupt):
        say("stopped")
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.RUN_FAILED)
    except Exception:
        say(traceback.format_exc().rstrip())
        say("this is a bug in fsdpq: please report it with the lines above")
        sys.exit(ExitCode.RUN_FAILED)


def _say_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        say(render_notice(notice))


def _report(error: FsdpqError, *, as_json: bool) -> None:
    if as_json:
        echo_json(error_fields(error))
    else:
        say(str(error) if isinstance(error, RunStoppedError) else render_error(error))
