"""``fsdpq cache``: what the cache holds, listed and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fsdpq.cli.answers import echo_json, json_option

if TYPE_CHECKING:
    from fsdpq.fetch.cache_entries import ListedEntry


@click.group("cache")
def cache_group() -> None:
    """List what the cache holds, and remove it.

    The cache is the directory FSDPQ_CACHE, by default `fsdpq` in the user's cache. It may hold
    FSDPQ_CACHE_LIMIT (`200GB`); bases and prepared data used longest ago make room for new ones.
    """


@cache_group.command("ls")
@json_option
def cache_ls(*, as_json: bool) -> None:
    """List the entries: packaged models, quantized bases, rows, prepared data, smoke runs."""
    from fsdpq.cli.render import render_table
    from fsdpq.fetch.cache import cache_root, format_bytes
    from fsdpq.fetch.cache_entries import cache_limit, list_entries

    entries = list_entries()
    total = sum(entry.num_bytes for entry in entries)
    limit = cache_limit(total)
    if as_json:
        rows = [_fields(entry) for entry in entries]
        root = str(cache_root())
        echo_json({"root": root, "total_bytes": total, "limit_bytes": limit, "entries": rows})
        return
    if entries:
        heads = ("entry", "size", "last used", "made by")
        lines = [
            (entry.name, format_bytes(entry.num_bytes), _when(entry), entry.made_by)
            for entry in entries
        ]
        for line in render_table([heads, *lines]):
            click.echo(line)
        click.echo()
    click.echo(f"{cache_root()}: {format_bytes(total)} of {format_bytes(limit)}")


@cache_group.command("clear")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--bases", is_flag=True, help="Remove every quantized base.")
@click.option("--prepared", is_flag=True, help="Remove all prepared data.")
@click.option("--all", "everything", is_flag=True, help="Remove every entry.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_clear(
    names: tuple[str, ...], *, bases: bool, prepared: bool, everything: bool, yes: bool
) -> None:
    """Remove the entries NAME of the cache, as `fsdpq cache ls` calls them.

    Entries that a process uses are kept. What is removed is listed on stdout.
    """
    from fsdpq.fetch.cache import format_bytes
    from fsdpq.fetch.cache_entries import BASES, PREPARED, list_entries, remove_entry

    sorts = [sort for sort, wanted in ((BASES, bases), (PREPARED, prepared)) if wanted]
    chosen = list_entries() if everything else _choose(names, sorts)
    if not chosen:
        click.echo("the cache holds nothing of that", err=True)
        return
    total = format_bytes(sum(entry.num_bytes for entry in chosen))
    if not yes:
        for entry in chosen:
            click.echo(f"  {entry.name}  {format_bytes(entry.num_bytes)}", err=True)
        click.confirm(f"remove {len(chosen)} of them, {total}?", abort=True, err=True)
    for entry in chosen:
        if remove_entry(entry):
            click.echo(entry.name)
        else:
            click.echo(f"kept `{entry.name}`: it is in use", err=True)


def _choose(names: tuple[str, ...], sorts: list[str]) -> list[ListedEntry]:
    from fsdpq.errors import UsageError
    from fsdpq.fetch.cache_entries import list_entries, select_entries

    entries = list_entries()
    if not names and not sorts:
        hint = "name entries that `fsdpq cache ls` lists, or give `--bases`, `--prepared` or "
        hint += "`--all`"
        raise UsageError("`fsdpq cache clear` was not told what to remove", hint=hint)
    chosen = [entry for entry in entries if entry.name.partition("/")[0] in sorts]
    named = select_entries(entries, names)
    return [*chosen, *(entry for entry in named if entry not in chosen)]


def _fields(entry: ListedEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "directory": str(entry.directory),
        "bytes": entry.num_bytes,
        "last_used": entry.last_used,
        "made_by": entry.made_by,
        "in_use": entry.in_use,
    }


def _when(entry: ListedEntry) -> str:
    from datetime import datetime

    if entry.in_use:
        return "in use"
    return datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
