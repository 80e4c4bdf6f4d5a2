"""``fsdpq push``: what a run exported, uploaded to the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.options import RunPath
from fsdpq.cli.render import clean, render_table
from fsdpq.errors import UsageError


@click.command("push")
@click.argument("run", type=RunPath())
@click.option("--to", "repository", required=True, metavar="USER/NAME", help="The repository.")
@click.option("--public", is_flag=True, help="Everybody may see it; default: only you.")
@click.option("--revision", metavar="BRANCH", help="A branch of it; default: the main branch.")
@click.option(
    "--base", metavar="ORG/NAME",
    help="Where the base model is on the hub, if the run read it from a directory.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask.")
def push_command(
    run: Path, *, repository: str, public: bool, revision: str | None, base: str | None, yes: bool
) -> None:
    """Upload what RUN exported to a repository of the Hugging Face hub.

    RUN is the directory of a finished run. Its files are listed first. You are who `hf auth login`
    says. The address is printed on stdout.
    """
    from fsdpq.fetch.hub_push import list_upload, push_files
    from fsdpq.run_files.amounts import format_bytes
    from fsdpq.run_files.paths import RunFiles

    uploads = list_upload(RunFiles(run), base=base)
    rows = [(clean(each.name), format_bytes(each.num_bytes)) for each in uploads]
    seen = "everybody may see it" if public else "private"
    branch = f", branch {clean(revision)}" if revision else ""
    for line in (f"to {clean(repository)} ({seen}{branch}):", *render_table(rows, indent="  ")):
        click.echo(line, err=True)
    if not yes:
        _ask()
    click.echo(push_files(uploads, repository, public=public, revision=revision))


def _ask() -> None:
    """Waits for a yes.

    Raises:
        UsageError: there is nobody to ask, or the answer is another one.
    """
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to ask", hint="add `--yes` to upload without a question")
    if not click.confirm("Upload?", err=True):
        raise UsageError("nothing was uploaded", hint="push again when you want to")
