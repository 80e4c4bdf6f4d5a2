"""``fsdpq train``: run a recipe, here or as a job of Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.options import (
    node_rank_option,
    recipe_arguments,
    screen_options,
    trust_option,
    warn_of_code,
)
from fsdpq.cli.submitting import SlurmChoice, slurm_options


@click.command("train")
@recipe_arguments
@click.option(
    "--run-dir", type=click.Path(path_type=Path),
    help="Where the run goes; default: a new directory in runs/.",
)  # fmt: skip
@click.option(
    "--base-dir", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="What relative paths of RECIPE start from; default: the directory that it is in.",
)  # fmt: skip
@click.option(
    "--smoke", is_flag=True,
    help="Try the recipe in a minute: tiny random model, made-up rows, a few steps on the CPU.",
)  # fmt: skip
@node_rank_option
@trust_option
@slurm_options
@screen_options
def train_command(  # noqa: PLR0913  one argument an option
    recipe: Path,
    *,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    base_dir: Path | None,
    smoke: bool,
    node_rank: int | None,
    trust_remote_code: bool,
    slurm: SlurmChoice,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train RECIPE, one process per GPU, and export what was trained.

    The run directory is printed on stdout when the run is finished, or submitted: with
    `launch.scheduler=slurm` it becomes a job.
    """
    from fsdpq.cli.run_result import echo_result, summed_up
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.train import train_loaded
    from fsdpq.recipe.load import load_recipe

    screen = open_screen(sys.stderr, quiet=quiet)
    warn_of_code(trust_remote_code)
    with summed_up(screen, as_json=as_json):
        loaded = load_recipe(recipe, overrides, base_dir=base_dir)
        if slurm.submit(loaded, run_dir=run_dir, screen=screen, smoke=smoke):
            return
        files = train_loaded(
            loaded,
            run_dir=run_dir,
            screen=screen,
            smoke=smoke,
            node_rank=node_rank,
            trust_remote_code=trust_remote_code,
        )
    screen.show_summary()
    echo_result(files, as_json=as_json)
