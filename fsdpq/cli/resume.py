"""``fsdpq resume``: go on with a run that ended early."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fsdpq.cli.options import trust_option, warn_of_code
from fsdpq.cli.submitting import SlurmChoice, slurm_options


@click.command("resume")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
@click.option(
    "--force", is_flag=True,
    help="Go on although settings, rows or the base are others than those of the checkpoint.",
)  # fmt: skip
@trust_option
@slurm_options
def resume_command(
    run: Path,
    *,
    overrides: tuple[str, ...],
    force: bool,
    trust_remote_code: bool,
    slurm: SlurmChoice,
) -> None:
    """Go on with the run in the directory RUN from its newest whole checkpoint.

    Where and how fast it runs may change: ranks, strategy, offload, micro-batches. RUN is printed
    on stdout when the run is finished, or submitted: with `launch.scheduler=slurm` it goes on as a
    job.
    """
    from fsdpq.cli.screen import open_screen
    from fsdpq.launch.resume import resume

    screen = open_screen(sys.stderr)
    warn_of_code(trust_remote_code)
    trusts = trust_remote_code
    if slurm.submit_resume(run, overrides, force=force, trust=trusts, screen=screen):
        return
    files = resume(run, overrides, screen=screen, force=force, trust_remote_code=trust_remote_code)
    screen.show_summary()
    click.echo(files.root)
