"""``fsdpq resume``: go on with a run that ended early."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.options import (
    RunPath,
    node_rank_option,
    screen_options,
    trust_option,
    warn_of_code,
)
from fsdpq.cli.submitting import SlurmChoice, slurm_options


@click.command("resume")
@click.argument("run", type=RunPath())
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
@click.option(
    "--force", is_flag=True,
    help="Go on although settings, rows or the base are others than those of the checkpoint.",
)  # fmt: skip
@node_rank_option
@trust_option
@slurm_options
@screen_options
def resume_command(
    run: Path,
    *,
    overrides: tuple[str, ...],
    force: bool,
    node_rank: int | None,
    trust_remote_code: bool,
    slurm: SlurmChoice,
    quiet: bool,
    as_json: bool,
) -> None:
    """Go on with the run in the directory RUN from its newest whole checkpoint.

    Where and how fast it runs may change: ranks, strategy, offload, micro-batches. RUN is printed
    on stdout when the run is finished, or submitted: with `launch.scheduler=slurm` it goes on as a
    job.
    """
    from fsdpq.cli.run_result import echo_result, summed_up
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.resume import resume

    screen = open_screen(sys.stderr, quiet=quiet)
    warn_of_code(trust_remote_code)
    with summed_up(screen, as_json=as_json):
        if slurm.submit_resume(run, overrides, force=force, screen=screen):
            return
        files = resume(
            run,
            overrides,
            screen=screen,
            force=force,
            node_rank=node_rank,
            trust_remote_code=trust_remote_code,
        )
    screen.show_summary()
    echo_result(files, as_json=as_json)
