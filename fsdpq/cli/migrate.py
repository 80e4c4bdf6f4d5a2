"""``fsdpq migrate``: a recipe of an older format version in the newest one."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("migrate")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--write", is_flag=True, help="Write the file instead of printing it.")
def migrate_command(recipe: Path, *, write: bool) -> None:
    """Rewrite RECIPE from an older version of the recipe format.

    Prints the new text on stdout; comments and order stay. What changed is listed on stderr.
    """
    from fsdpq.errors import UsageError
    from fsdpq.recipe.migrate import migrate
    from fsdpq.run_files.writing import write_whole

    migrated = migrate(recipe)
    for change in migrated.changes or ("nothing to do: it is of the newest version",):
        click.echo(change, err=True)
    if not write:
        click.echo(migrated.text, nl=False)
    elif migrated.changes:
        try:
            write_whole(recipe, migrated.text.encode("utf-8"))
        except OSError as error:
            message = f"`{recipe}` cannot be written: {error.strerror}"
            raise UsageError(message, hint="leave `--write` out to print it") from None
