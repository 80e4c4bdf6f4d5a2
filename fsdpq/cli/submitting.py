"""Giving a run to Slurm from the command line, where its recipe asks for it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from fsdpq.cli.answers import echo_json, error_fields
from fsdpq.errors import UsageError
from fsdpq.run_files.paths import RunFiles

if TYPE_CHECKING:  # a verb's help needs none of this
    from fsdpq.launch.screen import Screen
    from fsdpq.recipe.load import LoadedRecipe

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class SlurmChoice:
    """What the command line says about a job.

    Attributes:
        prints: show the batch script instead of submitting it.
        setup: file of shell lines that come first; None is the user's own, where there is one.
        as_json: what the run became is printed as JSON.
    """

    prints: bool = False
    setup: Path | None = None
    as_json: bool = False

    def submit(
        self,
        loaded: LoadedRecipe,
        *,
        run_dir: Path | None,
        screen: Screen,
        smoke: bool = False,
        trust: bool = False,
    ) -> bool:
        """Gives a run to Slurm where its recipe says so; returns whether it does.

        The directory of the run is printed on stdout, or else the script.

        Args:
            loaded: the recipe.
            run_dir: as given.
            screen: shows what happens.
            smoke: a smoke run starts here, whatever the recipe says.
            trust: let the ranks run the model's code.

        Raises:
            UsageError: something was asked of Slurm, and the recipe starts its ranks here.
            FsdpqError: the job could not be submitted.
        """
        if loaded.recipe.launch.scheduler != "slurm" or smoke:
            self.check_used()
            return False
        from fsdpq.launch.slurm.training_job import Submission, show_training_job, submit_training

        submission = Submission(self.setup, trust)
        if self.prints:
            click.echo(show_training_job(loaded, submission, run_dir=run_dir), nl=False)
            return True
        files, number = submit_training(loaded, submission, screen=screen, run_dir=run_dir)
        self._report(files, number, screen)
        return True

    def submit_resume(
        self, run: Path, overrides: Sequence[str], *, force: bool, trust: bool, screen: Screen
    ) -> bool:
        """Lets Slurm go on with a run where an override says so; returns whether it does.

        Args:
            run: its directory.
            overrides: ``launch.scheduler=slurm`` among them asks for it.
            force: go on although it becomes another run.
            trust: let the ranks run the model's code.
            screen: shows what happens.

        Raises:
            UsageError: something was asked of Slurm, and the run goes on here.
            FsdpqError: the job could not be submitted.
        """
        if "launch.scheduler=slurm" not in overrides:
            self.check_used()
            return False
        from fsdpq.launch.slurm.training_job import Submission, show_resume_job, submit_resume

        submission = Submission(self.setup, trust)
        if self.prints:
            click.echo(show_resume_job(run, overrides, submission, force=force), nl=False)
            return True
        number = submit_resume(run, overrides, submission, force=force)
        self._report(RunFiles(run), number, screen)
        return True

    def _report(self, files: RunFiles, number: int, screen: Screen) -> None:
        report_job(files, number, screen)
        if self.as_json:
            where = {"exit_code": 0, "run_dir": str(files.root), "state": "queued", "job": number}
            echo_json(error_fields(None) | where)
        else:
            click.echo(files.root)

    def check_used(self) -> None:
        """Checks that nothing was asked of Slurm.

        Raises:
            UsageError: something was.
        """
        given = "--print" if self.prints else "--slurm-setup" if self.setup is not None else ""
        if given:
            message = f"`{given}` has no effect: the run starts its ranks on this machine"
            raise UsageError(message, hint="give `launch.scheduler=slurm`, or leave it out")


def slurm_options(function: Function) -> Function:
    """Adds ``--print`` and ``--slurm-setup`` to a verb, as one argument ``slurm``."""

    @click.option(
        "--print", "prints", is_flag=True,
        help="Print the script that would be submitted to Slurm, and do nothing.",
    )  # fmt: skip
    @click.option(
        "--slurm-setup", "setup", type=click.Path(path_type=Path), metavar="FILE",
        help="Shell lines that a Slurm job starts with; default: "
        "~/.config/fsdpq/slurm-setup.sh, where it exists.",
    )  # fmt: skip
    @functools.wraps(function)
    def with_choice(*arguments: Any, prints: bool, setup: Path | None, **others: Any) -> Any:
        choice = SlurmChoice(prints, setup, as_json=others.get("as_json", False))
        return function(*arguments, slurm=choice, **others)

    return cast("Function", with_choice)


def report_job(files: RunFiles, number: int, screen: Screen) -> None:
    """Says which job a run became, and how to look at it."""
    run = shlex.quote(str(files.root))
    screen.report(f"submitted job {number}: `fsdpq status {run}` says how it stands,")
    screen.report(f"`fsdpq logs {run} --follow` shows what it prints, `fsdpq cancel {run}` ends it")
