"""``fsdpq data``: looks at the rows of a recipe before anything is trained on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fsdpq.cli.answers import json_option
from fsdpq.cli.options import recipe_arguments, say, trust_option, warn_of_code
from fsdpq.cli.render import problem_fields, render_error, wants_color
from fsdpq.errors import ExitCode, Location, Problem, UsageError

ERRORS = ("bad_row", "unrenderable", "over_limit")
"""Findings that end a run."""


@click.group("data")
def data_group() -> None:
    """Look at the rows of a recipe."""


@data_group.command("inspect")
@recipe_arguments
@click.option(
    "--rows", "num_samples", metavar="N", type=click.IntRange(0, 1000), default=3,
    show_default=True, help="Show so many rows as the model reads them, drawn by training.seed.",
)  # fmt: skip
@click.option(
    "--row", metavar="[FILE:]K", default="",
    help="Show row K of the file instead, token by token.",
)  # fmt: skip
@click.option(
    "--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with all of it.",
)  # fmt: skip
@json_option
@trust_option
def inspect_command(
    recipe: Path,
    *,
    overrides: tuple[str, ...],
    num_samples: int,
    row: str,
    html: Path | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Show what the model will see of the rows of RECIPE, and what is wrong with them.

    Counts, lengths, duplicates, bad rows and rows out of order, packing, and some rows with the
    tokens that carry loss marked. No weights are needed. Exits with 2 where rows are bad and
    data.on_bad_row is `error`.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.inspect import Wanted, inspect_data

    warn_of_code(trust_remote_code)
    content = inspect_data(
        recipe,
        overrides,
        Wanted(0 if row else num_samples, row),
        screen=open_screen(sys.stderr),
        trust_remote_code=trust_remote_code,
    )
    if html is not None:
        write_page(html, content)
    _show(content, one_row=bool(row), as_json=as_json)
    if not content["ok"]:
        sys.exit(ExitCode.RECIPE)


def _show(content: dict[str, Any], *, one_row: bool, as_json: bool) -> None:
    """Prints an inspection, and on stderr what keeps a run from starting."""
    from fsdpq.cli.inspection import render_inspection, render_row
    from fsdpq.cli.visible import encodable

    if as_json:
        problems = [problem_fields(problem) for problem in list_problems(content)]
        answer = {"ok": content["ok"], "problems": problems, **content}
        # ASCII: what rows hold must not reach a terminal.
        click.echo(json.dumps(answer, indent=2, ensure_ascii=True))
        return
    color = wants_color(sys.stdout)
    render = render_row if one_row else render_inspection
    for line in render(content, color=color):
        click.echo(encodable(line, sys.stdout), color=color)
    errors: list[dict[str, str]] = content["errors"]
    for error in errors:
        message = f"training would not start: {error['message']}"
        say(render_error(UsageError(message, error["hint"])))


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Writes the page of an inspection.

    Raises:
        UsageError: it cannot be written there.
    """
    from fsdpq.pages.inspection import render_inspection_page
    from fsdpq.run_files.writing import write_whole

    page = render_inspection_page(content)
    try:
        write_whole(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        message = f"the page cannot be written to `{path}`: {error.strerror or error}"
        raise UsageError(message, hint="choose another place: `--html FILE`") from error
    click.echo(f"wrote {path}", err=True)


def list_problems(content: dict[str, Any]) -> list[Problem]:
    """Returns what keeps a run from starting as Problems, and the first rows that do."""
    problems = [
        Problem(error["message"], "data", None, error["hint"]) for error in content["errors"]
    ]
    return problems + [
        Problem(
            finding["text"] if example["line"] else f"row {example['row']}: {finding['text']}",
            "data",
            Location(example["file"], example["line"], min(example["line"], 1), example["detail"]),
        )
        for finding in content["findings"]
        if finding["kind"] in ERRORS and content["errors"]
        for example in finding["examples"]
    ]
