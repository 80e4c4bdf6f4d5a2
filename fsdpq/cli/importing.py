"""``fsdpq import``: another tool's config becomes a recipe, with an account of every key."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.render import clean, render_table
from fsdpq.errors import UsageError

if TYPE_CHECKING:
    from fsdpq.importing.result import Finding, ImportResult

_TOOLS = ("auto", "axolotl", "llamafactory", "torchtune", "trl", "fsdp_qlora")
_COUNTED = ("converted", "built_in")
"""Outcomes that the table only counts; ``--json`` lists them."""


@click.command("import")
@click.argument("words", nargs=-1, metavar="FILE | -- COMMAND...")
@click.option(
    "--from",
    "tool",
    type=click.Choice(_TOOLS),
    default="auto",
    show_default=True,
    help="The tool that the config was written for.",
)
@click.option(
    "--accelerate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An accelerate config that goes with one of LLaMA-Factory or TRL.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="Write the recipe there instead of to stdout; an existing file is kept.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print recipe and findings as JSON on stdout."
)
def import_command(
    words: tuple[str, ...], *, tool: str, accelerate: Path | None, out: Path | None, as_json: bool
) -> None:
    """Turn another tool's config FILE into a recipe, and tell what became of every key.

    For fsdp_qlora, FILE holds the command, or the command comes after `--`. Nothing that the config
    names is fetched, imported or run.
    """  # fmt: skip
    from fsdpq.importing.write import write_recipe

    result = _convert(words, tool, accelerate, out)
    text = write_recipe(result, out=out)
    if out is not None:
        _save(out, text)
    if as_json:
        click.echo(json.dumps(_fields(result), indent=2))
    elif out is None:
        click.echo(text, nl=False)
    else:
        click.echo(out)
    for line in render_findings(result):
        click.echo(line, err=True)


def _convert(
    words: tuple[str, ...], tool: str, accelerate: Path | None, out: Path | None
) -> ImportResult:
    from fsdpq.importing.convert import import_config, import_words

    base_dir = out.parent if out is not None else None
    if len(words) == 1 and not words[0].startswith("--"):
        return import_config(Path(words[0]), tool=tool, accelerate=accelerate, base_dir=base_dir)
    if not words:
        hint = "name a file: `fsdpq import config.yaml --from axolotl`"
        raise UsageError("there is nothing to import", hint=hint)
    if tool not in ("auto", "fsdp_qlora"):
        message = f"a config of {tool} is one file, not {len(words)} words"
        raise UsageError(message, hint="words after `--` are a command of fsdp_qlora")
    return import_words(words, base_dir=base_dir or Path())


def _save(out: Path, text: str) -> None:
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"`{out}` is there already", hint="choose another `--out`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"`{out}` cannot be written: {reason}"
        raise UsageError(message, hint="choose another `--out`") from None


def render_findings(result: ImportResult) -> Iterator[str]:
    """Yields what became of the keys as tables, the ones that need a look first."""
    from fsdpq.importing.result import TITLES

    for outcome, title in TITLES.items():
        found = result.of(outcome)
        if not found or outcome in _COUNTED:
            continue
        heading = f"{title.format(tool=result.tool)} ({len(found)})"
        yield click.style(heading, bold=True) if sys.stderr.isatty() else heading
        yield from render_table([_row(finding) for finding in found], indent="  ")
        yield ""
    counts = [f"{len(result.of(o))} {TITLES[o].partition(':')[0]}" for o in _COUNTED]
    yield f"keys: {', '.join(counts)}; `--json` lists them"


def _row(finding: Finding) -> tuple[str, str, str]:
    place = finding.location
    line = f"{clean(place.source)}:{place.line}" if place is not None and place.line else ""
    shown = f"{finding.key}: {finding.value}" if finding.value not in ("", "null") else finding.key
    target = (
        f"{finding.target}: {finding.value}" if finding.outcome == "default" else finding.target
    )
    message = finding.message
    if finding.outcome in ("default", "refused"):
        shown = target
    return line, clean(shown or target), clean(message)


def _fields(result: ImportResult) -> dict[str, Any]:
    return {
        "tool": result.tool,
        "source": result.source,
        "recipe": result.document,
        "findings": [
            {
                "outcome": finding.outcome,
                "key": finding.key,
                "value": finding.value,
                "target": finding.target,
                "message": finding.message,
                "line": finding.location.line if finding.location else None,
                "column": finding.location.column if finding.location else None,
            }
            for finding in result.findings
        ],
    }
